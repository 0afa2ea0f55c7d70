// SPDX-License-Identifier: Apache-2.0
#pragma once

// The loops over a tile's tokens, rank rows and vectors have constant bounds and must unroll
// completely, or the sums leave the registers; so must whatever is called inside be inlined.
#define TOPPINGS_INLINE [[gnu::always_inline]] inline
#define TOPPINGS_UNROLL _Pragma("GCC unroll 16")

namespace toppings::cpu {
namespace {

// Into the second-level cache.
TOPPINGS_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace
}  // namespace toppings::cpu
