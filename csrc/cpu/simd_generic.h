// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/convert.h"
#include "cpu/unroll.h"

namespace toppings::cpu {
namespace {

// Four lanes in the compiler's own vector type: whatever the target's baseline has. This file's
// user is compiled with -ffp-contract=off, so that multiply and add stay two roundings on every
// target and in every tile.
struct Simd {
  using F = float __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  // Tiles whose sums take 8 of 16 registers.
  static constexpr int kShrinkTokens = 2;  // with 4 rank rows
  static constexpr int kStreamSums = 8;
  static constexpr int kPanelTokens = 4;
  static constexpr int kPanelGroups = 1;  // of kGroupColumns

  static F zero() { return F{}; }
  static F broadcast(float value) { return F{value, value, value, value}; }
  static F add(F a, F b) { return a + b; }
  static F mul(F a, F b) { return a * b; }
  static F mul_add(F a, F b, F c) { return a * b + c; }

  // total[i] = the sum of f[i]'s lanes.
  template <int N>
  TOPPINGS_INLINE static void sums(const F (&f)[N], float (&total)[N]) {
    for (int i = 0; i < N; ++i) total[i] = (f[i][0] + f[i][2]) + (f[i][1] + f[i][3]);
  }

  template <class T>
  static F load(const T* p) {
    return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }

  template <class T>
  static F load(const T* p, int n) {
    float f[kWidth] = {};
    for (int i = 0; i < n; ++i) f[i] = to_float(p[i]);
    return F{f[0], f[1], f[2], f[3]};
  }

  template <class T>
  static void store(T* p, F f) {
    for (int i = 0; i < kWidth; ++i) from_float(f[i], p[i]);
  }

  template <class T>
  static void store(T* p, F f, int n) {
    for (int i = 0; i < n; ++i) from_float(f[i], p[i]);
  }
};

}  // namespace
}  // namespace toppings::cpu
