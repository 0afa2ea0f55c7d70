// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"

// Register tiles over a level's `Simd`, which must be defined before. Everything is in an unnamed
// namespace: see kernels.h. The loops over a tile's tokens, rank rows and groups have constant
// bounds and must unroll completely, or the sums leave the registers; hence the pragmas, and
// always_inline on whatever is called inside.
#define TOPPINGS_INLINE [[gnu::always_inline]] inline
#define TOPPINGS_UNROLL _Pragma("GCC unroll 8")

namespace toppings::cpu {
namespace {

// ---- shrink: dot products along K

// One step of a dot product: both operands are converted to fp32.
template <class X_, class W_>
struct DotF32 {
  using X = X_;
  using W = W_;
  using Vector = typename Simd::F;
  using Sum = typename Simd::F;
  static constexpr int kStep = Simd::kWidth;
  static constexpr int kTokens = Simd::kShrinkTokens;

  template <class T>
  TOPPINGS_INLINE static Vector load(const T* p) {
    return Simd::load(p);
  }
  template <class T>
  TOPPINGS_INLINE static Vector load(const T* p, int n) {
    return Simd::load(p, n);
  }
  TOPPINGS_INLINE static Sum mul_add(Vector x, Vector w, Sum sum) {
    return Simd::mul_add(x, w, sum);
  }
};

template <class Dot, int kTokens, int kRanks>
TOPPINGS_INLINE void shrink_tile(const ShrinkArgs& args, std::int64_t token, std::int64_t rank) {
  const std::int64_t in = args.in;
  const typename Dot::X* x[kTokens];
  const typename Dot::W* a[kRanks];
  typename Dot::Sum sum[kTokens][kRanks];
  TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
    x[t] = static_cast<const typename Dot::X*>(args.x) + args.rows[token + t] * args.x_stride;
    TOPPINGS_UNROLL for (int j = 0; j < kRanks; ++j) sum[t][j] = Simd::zero();
  }
  TOPPINGS_UNROLL for (int j = 0; j < kRanks; ++j) {
    a[j] = static_cast<const typename Dot::W*>(args.a) + (rank + j) * in;
  }

  const auto step = [&](auto load) __attribute__((always_inline)) {
    typename Dot::Vector xs[kTokens];
    TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) xs[t] = load(x[t]);
    TOPPINGS_UNROLL for (int j = 0; j < kRanks; ++j) {
      const typename Dot::Vector w = load(a[j]);
      TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
        sum[t][j] = Dot::mul_add(xs[t], w, sum[t][j]);
      }
    }
  };
  std::int64_t k = 0;
  for (; k + Dot::kStep <= in; k += Dot::kStep) {
    step([k](auto* p) __attribute__((always_inline)) { return Dot::load(p + k); });
  }
  if (k < in) {
    const int n = static_cast<int>(in - k);
    step([k, n](auto* p) __attribute__((always_inline)) { return Dot::load(p + k, n); });
  }
  TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
    TOPPINGS_UNROLL for (int j = 0; j < kRanks; ++j) {
      args.v[(token + t) * args.v_stride + rank + j] = Simd::sum(sum[t][j]);
    }
  }
}

// All rank rows of kTokens tokens, kRanks at a time.
template <class Dot, int kTokens, int kRanks>
void shrink_tokens(const ShrinkArgs& args, std::int64_t token) {
  std::int64_t rank = 0;
  for (; rank + kRanks <= args.ranks; rank += kRanks) {
    shrink_tile<Dot, kTokens, kRanks>(args, token, rank);
  }
  if constexpr (kRanks > 4) {
    for (; rank + 4 <= args.ranks; rank += 4) shrink_tile<Dot, kTokens, 4>(args, token, rank);
  }
  for (; rank < args.ranks; ++rank) shrink_tile<Dot, kTokens, 1>(args, token, rank);
}

template <class Dot>
void shrink(const ShrinkArgs& args) {
  std::int64_t token = 0;
  for (; token + Dot::kTokens <= args.tokens; token += Dot::kTokens) {
    shrink_tokens<Dot, Dot::kTokens, 4>(args, token);
  }
  if constexpr (Dot::kTokens > 2) {
    for (; token + 2 <= args.tokens; token += 2) shrink_tokens<Dot, 2, 4>(args, token);
  }
  for (; token < args.tokens; ++token) shrink_tokens<Dot, 1, 8>(args, token);
}

// ---- expand: sums of rank rows, a few groups of columns at a time

// One rank row at a time; v and B in fp32. A group is one vector of columns.
template <class Y_, class W_>
struct AxpyF32 {
  using Y = Y_;
  using W = W_;
  using V = float;
  using Rows = typename Simd::F;
  using Sum = typename Simd::F;
  static constexpr int kRows = 1;
  static constexpr int kColumns = Simd::kWidth;
  static constexpr int kTokens = Simd::kExpandTokens;
  static constexpr int kGroups = Simd::kExpandGroups;

  TOPPINGS_INLINE static Sum zero() { return Simd::zero(); }
  TOPPINGS_INLINE static Rows load(const W* b, std::int64_t) { return Simd::load(b); }
  TOPPINGS_INLINE static Rows load(const W* b, std::int64_t, int n) { return Simd::load(b, n); }
  TOPPINGS_INLINE static Sum mul_add(const V* v, Rows rows, Sum sum) {
    return Simd::mul_add(Simd::broadcast(*v), rows, sum);
  }
  TOPPINGS_INLINE static void add_to(Y* y, float scale, Sum sum) {
    Simd::store(y, Simd::mul_add(Simd::broadcast(scale), sum, Simd::load(y)));
  }
  TOPPINGS_INLINE static void add_to(Y* y, float scale, Sum sum, int n) {
    Simd::store(y, Simd::mul_add(Simd::broadcast(scale), sum, Simd::load(y, n)), n);
  }
};

// kGroups whole groups of columns, or with kTail the first n columns of one.
template <class Axpy, int kTokens, int kGroups, bool kTail = false>
TOPPINGS_INLINE void expand_tile(const ExpandArgs& args, std::int64_t token, std::int64_t column,
                                 int n = 0) {
  const typename Axpy::W* b = static_cast<const typename Axpy::W*>(args.b) + column;
  const typename Axpy::V* v = static_cast<const typename Axpy::V*>(args.v) + token * args.v_stride;
  typename Axpy::Sum sum[kTokens][kGroups];
  TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
    TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) sum[t][g] = Axpy::zero();
  }
  const auto step = [&](auto load) __attribute__((always_inline)) {
    typename Axpy::Rows rows[kGroups];
    TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) rows[g] = load(b + g * Axpy::kColumns);
    TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
      TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) {
        sum[t][g] = Axpy::mul_add(v + t * args.v_stride, rows[g], sum[t][g]);
      }
    }
  };
  std::int64_t rank = 0;
  for (; rank + Axpy::kRows <= args.ranks; rank += Axpy::kRows) {
    step([&](const typename Axpy::W* p) __attribute__((always_inline)) {
      if constexpr (kTail) {
        return Axpy::load(p, args.b_stride, n);
      } else {
        return Axpy::load(p, args.b_stride);
      }
    });
    b += Axpy::kRows * args.b_stride;
    v += Axpy::kRows;
  }
  if constexpr (Axpy::kRows > 1) {
    if (rank < args.ranks) {
      step([&](const typename Axpy::W* p) __attribute__((always_inline)) {
        if constexpr (kTail) {
          return Axpy::load_last(p, n);
        } else {
          return Axpy::load_last(p);
        }
      });
    }
  }
  TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
    typename Axpy::Y* y =
        static_cast<typename Axpy::Y*>(args.y) + args.rows[token + t] * args.y_stride + column;
    TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) {
      if constexpr (kTail) {
        Axpy::add_to(y, args.scale, sum[t][g], n);
      } else {
        Axpy::add_to(y + g * Axpy::kColumns, args.scale, sum[t][g]);
      }
    }
  }
}

// All columns of kTokens tokens.
template <class Axpy, int kTokens, int kGroups>
void expand_tokens(const ExpandArgs& args, std::int64_t token) {
  constexpr int kColumns = Axpy::kColumns;
  const std::int64_t end = args.columns;
  std::int64_t column = 0;
  for (; column + kGroups * kColumns <= end; column += kGroups * kColumns) {
    expand_tile<Axpy, kTokens, kGroups>(args, token, column);
  }
  if constexpr (kGroups > 1) {
    for (; column + kColumns <= end; column += kColumns) {
      expand_tile<Axpy, kTokens, 1>(args, token, column);
    }
  }
  if (column < end) {
    expand_tile<Axpy, kTokens, 1, true>(args, token, column, static_cast<int>(end - column));
  }
}

// Columns of B taken together: all tokens use them while they are in the first-level cache.
inline constexpr std::int64_t kPanel = 128;

// From this many tokens on, and up to this size, a panel is copied first: rows of B that lie a
// power of two apart would push each other out of the cache.
inline constexpr std::int64_t kPackedTokens = 12;
inline constexpr std::int64_t kPackedBytes = 64 * 1024;

// At most kPanel columns, for all tokens.
template <class Axpy>
void expand_panel(const ExpandArgs& args) {
  constexpr int kTokens = Axpy::kTokens;
  constexpr int kFew = 2 * Axpy::kGroups < 4 ? 2 * Axpy::kGroups : 4;  // groups, for 1 or 2 tokens
  std::int64_t token = 0;
  for (; token + kTokens <= args.tokens; token += kTokens) {
    expand_tokens<Axpy, kTokens, Axpy::kGroups>(args, token);
  }
  for (; token + 2 <= args.tokens; token += 2) expand_tokens<Axpy, 2, kFew>(args, token);
  for (; token < args.tokens; ++token) expand_tokens<Axpy, 1, kFew>(args, token);
}

template <class Axpy>
void expand(const ExpandArgs& args) {
  using W = typename Axpy::W;
  const bool packs =
      args.tokens >= kPackedTokens && args.ranks * kPanel * std::int64_t{sizeof(W)} <= kPackedBytes;
  alignas(64) unsigned char packed[kPackedBytes];
  ExpandArgs panel = args;
  for (std::int64_t column = 0; column < args.columns; column += kPanel) {
    panel.columns = column + kPanel < args.columns ? kPanel : args.columns - column;
    panel.b = static_cast<const W*>(args.b) + column;
    panel.y = static_cast<typename Axpy::Y*>(args.y) + column;
    if (packs) {
      W* to = reinterpret_cast<W*>(packed);
      for (std::int64_t rank = 0; rank < args.ranks; ++rank) {
        const W* from = static_cast<const W*>(args.b) + rank * args.b_stride + column;
        __builtin_memcpy(to + rank * kPanel, from,
                         static_cast<std::size_t>(panel.columns) * sizeof(W));
      }
      panel.b = packed;
      panel.b_stride = kPanel;
    }
    expand_panel<Axpy>(panel);
  }
}

// ---- the table, in the order of DType: fp32, fp16, bf16

constexpr Kernels fp32_kernels() {
  return Kernels{
      .shrink = {{shrink<DotF32<float, float>>, shrink<DotF32<float, f16>>,
                  shrink<DotF32<float, bf16>>},
                 {shrink<DotF32<f16, float>>, shrink<DotF32<f16, f16>>, shrink<DotF32<f16, bf16>>},
                 {shrink<DotF32<bf16, float>>, shrink<DotF32<bf16, f16>>,
                  shrink<DotF32<bf16, bf16>>}},
      .expand = {{expand<AxpyF32<float, float>>, expand<AxpyF32<float, f16>>,
                  expand<AxpyF32<float, bf16>>},
                 {expand<AxpyF32<f16, float>>, expand<AxpyF32<f16, f16>>,
                  expand<AxpyF32<f16, bf16>>},
                 {expand<AxpyF32<bf16, float>>, expand<AxpyF32<bf16, f16>>,
                  expand<AxpyF32<bf16, bf16>>}},
      .expand_bf16 = nullptr,
      .rank_tile = 4,
      .column_tile = kPanel,
  };
}

}  // namespace
}  // namespace toppings::cpu
