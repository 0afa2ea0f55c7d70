// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels.h"
#include "cpu/unit.h"

// Expand for few tokens of one adapter, where memory is the limit: B is read once, as it lies
// there.
namespace toppings::cpu {
namespace {

// Expand reads kStreams rank rows side by side, through all columns at hand, and meanwhile
// prefetches the next ones: fastest on Zen 4, where the hardware alone follows one stream well but
// not several.
template <class Y, class W>
struct ExpandRows {
  const W* b;  // the first of up to kStreams rank rows
  std::int64_t b_stride;
  int ranks, next_ranks;  // to read, and to prefetch behind them
  const float* units;     // of those rank rows
  std::int64_t units_stride;
  float* partial;  // [tokens, partial_stride], column by column as in a tile's vectors
  std::int64_t partial_stride;
  bool begins, ends;  // the sums start at zero; are added to y
  Y* const* y;
  const std::byte* next;  // to prefetch too
  std::int64_t next_bytes;
};

template <class Unit, int kTokens, int kGroups, bool kTail, class Y, class W>
TOPPINGS_INLINE void expand_tile(const ExpandRows<Y, W>& rows, std::int64_t token,
                                 std::int64_t column, int n) {
  const W* b = rows.b + column;
  const float* units = rows.units + token * rows.units_stride;
  F sum[kTokens][kGroups][2];
  TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
    const float* from = rows.partial + (token + t) * rows.partial_stride + column;
    TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) {
      TOPPINGS_UNROLL for (int i = 0; i < 2; ++i) {
        sum[t][g][i] =
            rows.begins ? Simd::zero() : Simd::load(from + g * kGroupColumns + i * Simd::kWidth);
      }
    }
  }
  const auto step = [&](auto load) __attribute__((always_inline)) {
    F w[kGroups][2];
    TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) load(b + g * kGroupColumns, w[g]);
    TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
      const F v = Simd::broadcast(units[t * rows.units_stride]);
      TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) {
        TOPPINGS_UNROLL for (int i = 0; i < 2; ++i) {
          sum[t][g][i] = Unit::mul_add(v, w[g][i], sum[t][g][i]);
        }
      }
    }
  };
  int rank = 0;
  for (; rank + Unit::kElements <= rows.ranks; rank += Unit::kElements) {
    step([&](const W* p, F(&w)[2]) __attribute__((always_inline)) {
      if constexpr (kTail) {
        Unit::load_rows(p, rows.b_stride, w, n);
      } else {
        Unit::load_rows(p, rows.b_stride, w);
      }
    });
    b += Unit::kElements * rows.b_stride;
    ++units;
  }
  if constexpr (Unit::kElements > 1) {
    if (rank < rows.ranks) {
      step([&](const W* p, F(&w)[2]) __attribute__((always_inline)) {
        if constexpr (kTail) {
          Unit::load_last_row(p, w, n);
        } else {
          Unit::load_last_row(p, w);
        }
      });
    }
  }
  TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
    if (rows.ends) {
      Y* y = rows.y[token + t] + column;
      TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) {
        if constexpr (kTail) {
          Unit::add_to(y, sum[t][g], n);
        } else {
          Unit::add_to(y + g * kGroupColumns, sum[t][g]);
        }
      }
    } else {
      float* to = rows.partial + (token + t) * rows.partial_stride + column;
      TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) {
        TOPPINGS_UNROLL for (int i = 0; i < 2; ++i) {
          Simd::store(to + g * kGroupColumns + i * Simd::kWidth, sum[t][g][i]);
        }
      }
    }
  }
}

// All tokens through the columns from `column` on, kGroups groups of them or with kTail n columns.
template <class Unit, int kGroups, bool kTail, class Y, class W>
TOPPINGS_INLINE void expand_tiles(const ExpandRows<Y, W>& rows, std::int64_t tokens,
                                  std::int64_t column, int n) {
  for (int i = 0; i < rows.next_ranks; ++i) {
    const W* next = rows.b + (rows.ranks + i) * rows.b_stride + column;
    for (int c = 0; c < kGroups * kGroupColumns; c += 64 / sizeof(W)) prefetch(next + c);
  }
  // As many bytes as this tile reads.
  const std::int64_t row_bytes = rows.ranks * std::int64_t{sizeof(W)};
  const std::int64_t next_end = (column + kGroups * kGroupColumns) * row_bytes;
  for (std::int64_t at = column * row_bytes; at < next_end && at < rows.next_bytes; at += 64) {
    prefetch(rows.next + at);
  }
  std::int64_t token = 0;
  constexpr int kTokens = Simd::kStreamSums / (2 * kGroups);
  if constexpr (kTokens >= 4) {
    for (; token + 4 <= tokens; token += 4) {
      expand_tile<Unit, 4, kGroups, kTail>(rows, token, column, n);
    }
  }
  if constexpr (kTokens >= 2) {
    for (; token + 2 <= tokens; token += 2) {
      expand_tile<Unit, 2, kGroups, kTail>(rows, token, column, n);
    }
  }
  for (; token < tokens; ++token) {
    expand_tile<Unit, 1, kGroups, kTail>(rows, token, column, n);
  }
}

template <class Unit, int kGroups, class Y, class W>
void expand_columns(const ExpandRows<Y, W>& rows, std::int64_t tokens, std::int64_t columns) {
  std::int64_t column = 0;
  for (; column + kGroups * kGroupColumns <= columns; column += kGroups * kGroupColumns) {
    expand_tiles<Unit, kGroups, false>(rows, tokens, column, 0);
  }
  for (; column + kGroupColumns <= columns; column += kGroupColumns) {
    expand_tiles<Unit, 1, false>(rows, tokens, column, 0);
  }
  if (column < columns) {
    expand_tiles<Unit, 1, true>(rows, tokens, column, static_cast<int>(columns - column));
  }
}

template <class Unit, class W, class Y>
void expand_stream(const ExpandArgs& args, const float* units, Y* const* y, float* partial) {
  const auto least = [](std::int64_t one, std::int64_t other) { return one < other ? one : other; };
  const std::int64_t steps = (args.ranks + Unit::kElements - 1) / Unit::kElements;
  const std::int64_t most = kPartialFloats / args.tokens / kGroupColumns * kGroupColumns;
  for (std::int64_t column = 0; column < args.columns; column += most) {
    const std::int64_t columns = least(most, args.columns - column);
    Y* y_columns[kFewTokens];
    for (std::int64_t t = 0; t < args.tokens; ++t) y_columns[t] = y[t] + column;
    for (std::int64_t rank = 0; rank < args.ranks; rank += kStreams) {
      const std::int64_t left = args.ranks - rank;
      const std::int64_t ranks = least(kStreams, left);
      const bool is_last = ranks == left && column + most >= args.columns;
      const ExpandRows<Y, W> rows{
          .b = static_cast<const W*>(args.b) + rank * args.b_stride + column,
          .b_stride = args.b_stride,
          .ranks = static_cast<int>(ranks),
          .next_ranks = static_cast<int>(least(kStreams, left - ranks)),
          .units = units + rank / Unit::kElements,
          .units_stride = steps,
          .partial = partial,
          .partial_stride = most,
          .begins = rank == 0,
          .ends = ranks == left,
          .y = y_columns,
          .next = args.next,
          .next_bytes = is_last ? args.next_bytes : 0,
      };
      expand_columns<Unit, Simd::kStreamSums / 4>(rows, args.tokens, columns);
    }
  }
}

}  // namespace
}  // namespace toppings::cpu
