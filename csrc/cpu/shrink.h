// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels.h"
#include "cpu/unit.h"

// Shrink: dot products along K, straight from A and x as they lie in memory.
namespace toppings::cpu {
namespace {

// next: bytes that are wanted soon, prefetched as A is read; may be null.
template <class Unit, class X, class A, int kTokens, int kRanks>
TOPPINGS_INLINE void shrink_tile(const ShrinkArgs& args, std::int64_t token, std::int64_t rank,
                                 const std::byte* next = nullptr) {
  constexpr int kStep = Simd::kWidth * Unit::kElements;
  const std::int64_t in = args.in;
  const X* x[kTokens];
  const A* a[kRanks];
  F sum[kTokens * kRanks];
  TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
    x[t] = static_cast<const X*>(args.x) + args.rows[token + t] * args.x_stride;
  }
  TOPPINGS_UNROLL for (int j = 0; j < kRanks; ++j) {
    a[j] = static_cast<const A*>(args.a) + (rank + j) * in;
  }
  TOPPINGS_UNROLL for (int i = 0; i < kTokens * kRanks; ++i) sum[i] = Simd::zero();

  const auto step = [&](auto load) __attribute__((always_inline)) {
    F xs[kTokens];
    TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) xs[t] = load(x[t]);
    TOPPINGS_UNROLL for (int j = 0; j < kRanks; ++j) {
      const F w = load(a[j]);
      TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
        sum[t * kRanks + j] = Unit::mul_add(xs[t], w, sum[t * kRanks + j]);
      }
    }
  };
  std::int64_t k = 0;
  for (; k + kStep <= in; k += kStep) {
    // One line at a time, however short a step is.
    constexpr std::int64_t kLine = 64 / std::int64_t{sizeof(A)};
    if (next != nullptr && k % kLine == 0) prefetch(next + k * std::int64_t{sizeof(A)});
    step([k](auto* p) __attribute__((always_inline)) { return Unit::load(p + k); });
  }
  if (k < in) {
    const int n = static_cast<int>(in - k);
    step([k, n](auto* p) __attribute__((always_inline)) { return Unit::load(p + k, n); });
  }
  float total[kTokens * kRanks];
  Simd::sums(sum, total);
  TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
    float* v = args.v + (token + t) * args.v_stride + rank;
    TOPPINGS_UNROLL for (int j = 0; j < kRanks; ++j) v[j] = total[t * kRanks + j];
  }
}

template <class Unit, class X, class A, int kTokens, int kRanks>
void shrink_ranks(const ShrinkArgs& args, std::int64_t token, std::int64_t rank,
                  std::int64_t rank_end) {
  for (; rank + kRanks <= rank_end; rank += kRanks) {
    shrink_tile<Unit, X, A, kTokens, kRanks>(args, token, rank);
  }
  if constexpr (kRanks > 4) {
    for (; rank + 4 <= rank_end; rank += 4) {
      shrink_tile<Unit, X, A, kTokens, 4>(args, token, rank);
    }
  }
  for (; rank < rank_end; ++rank) shrink_tile<Unit, X, A, kTokens, 1>(args, token, rank);
}

// All tokens through the rank rows [rank, rank_end).
template <class Unit, class X, class A>
void shrink_chunk(const ShrinkArgs& args, std::int64_t rank, std::int64_t rank_end) {
  constexpr int kTokens = Simd::kShrinkTokens;
  std::int64_t token = 0;
  for (; token + kTokens <= args.tokens; token += kTokens) {
    shrink_ranks<Unit, X, A, kTokens, 4>(args, token, rank, rank_end);
  }
  if constexpr (kTokens > 2) {
    for (; token + 2 <= args.tokens; token += 2) {
      shrink_ranks<Unit, X, A, 2, 4>(args, token, rank, rank_end);
    }
  }
  for (; token < args.tokens; ++token) shrink_ranks<Unit, X, A, 1, 8>(args, token, rank, rank_end);
}

// For few tokens memory is the limit, and it is fastest when A is one stream: row after row,
// although a single row's sums depend on one another. The hardware prefetches a long stream best by
// itself; in an A of at most so many bytes it doesn't get up to speed.
inline constexpr std::int64_t kShortStream = 64 * 1024;

template <class Unit, class X, class A>
void shrink_stream(const ShrinkArgs& args) {
  const bool is_short = args.ranks * args.in * std::int64_t{sizeof(A)} <= kShortStream;
  for (std::int64_t rank = 0; rank < args.ranks; ++rank) {
    // Rows into `next`: the last kStreams rows of A prefetch it, or all of fewer.
    const std::int64_t ahead = args.ranks < kStreams ? rank : rank + kStreams - args.ranks;
    const std::byte* next = nullptr;
    if (ahead < 0 && is_short) {
      next = static_cast<const std::byte*>(args.a) +
             (rank + kStreams) * args.in * std::int64_t{sizeof(A)};
    } else if (ahead >= 0 && ahead < args.next_rows) {
      next = args.next + ahead * args.next_bytes;
    }
    if (args.tokens == 2) {
      shrink_tile<Unit, X, A, 2, 1>(args, 0, rank, next);
    } else {
      shrink_tile<Unit, X, A, 1, 1>(args, 0, rank, next);
    }
  }
}

// Rows of A that stay in the second-level cache while all tokens pass: this many bytes, at least
// eight rows.
inline constexpr std::int64_t kShrinkChunkBytes = 512 * 1024;

template <class Unit, class X, class A>
void shrink(const ShrinkArgs& args) {
  if (args.tokens <= 2) {
    shrink_stream<Unit, X, A>(args);
    return;
  }
  const std::int64_t fitting = kShrinkChunkBytes / (args.in * std::int64_t{sizeof(A)});
  const std::int64_t chunk = fitting < 8 ? 8 : fitting / 8 * 8;
  for (std::int64_t rank = 0; rank < args.ranks; rank += chunk) {
    shrink_chunk<Unit, X, A>(args, rank, rank + chunk < args.ranks ? rank + chunk : args.ranks);
  }
}

}  // namespace
}  // namespace toppings::cpu
