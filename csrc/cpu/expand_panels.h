// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/kernels.h"
#include "cpu/unit.h"

// Expand for several tokens of one adapter. A panel of B, a few columns of all its rank rows, is
// copied into the first-level cache in the order in which the tiles read it, and all tokens use it
// there: rows that lie a power of two apart no longer push each other out of the cache, and 16-bit
// weights are converted, or paired, once for all tokens.
namespace toppings::cpu {
namespace {

// [groups, steps, 2] vectors
template <class Unit, class W>
void fill_panel(const W* b, std::int64_t b_stride, std::int64_t ranks, std::int64_t columns,
                float* panel) {
  for (std::int64_t column = 0; column < columns; column += kGroupColumns) {
    const W* from = b + column;
    const bool whole = columns - column >= kGroupColumns;
    const int n = static_cast<int>(columns - column);
    for (std::int64_t rank = 0; rank < ranks; rank += Unit::kElements) {
      F rows[2];
      if (rank + Unit::kElements > ranks) {
        if constexpr (Unit::kElements > 1) {
          if (whole) {
            Unit::load_last_row(from, rows);
          } else {
            Unit::load_last_row(from, rows, n);
          }
        }
      } else if (whole) {
        Unit::load_rows(from, b_stride, rows);
      } else {
        Unit::load_rows(from, b_stride, rows, n);
      }
      Simd::store(panel, rows[0]);
      Simd::store(panel + Simd::kWidth, rows[1]);
      panel += kGroupColumns;
      from += Unit::kElements * b_stride;
    }
  }
}

// kTokens tokens by kGroups groups of columns; with kTail one group, of which n columns exist.
template <class Unit, int kTokens, int kGroups, bool kTail, class Y>
TOPPINGS_INLINE void panel_tile(const float* units, std::int64_t steps, const float* panel,
                                Y* const* y, std::int64_t column, int n) {
  F sum[kTokens][kGroups][2];
  TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
    TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) sum[t][g][0] = sum[t][g][1] = Simd::zero();
  }
  const std::int64_t group_size = steps * kGroupColumns;
  for (std::int64_t step = 0; step < steps; ++step, panel += kGroupColumns) {
    F w[kGroups][2];
    TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) {
      w[g][0] = Simd::load(panel + g * group_size);
      w[g][1] = Simd::load(panel + g * group_size + Simd::kWidth);
    }
    TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
      const F v = Simd::broadcast(units[t * steps + step]);
      TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) {
        sum[t][g][0] = Unit::mul_add(v, w[g][0], sum[t][g][0]);
        sum[t][g][1] = Unit::mul_add(v, w[g][1], sum[t][g][1]);
      }
    }
  }
  TOPPINGS_UNROLL for (int t = 0; t < kTokens; ++t) {
    TOPPINGS_UNROLL for (int g = 0; g < kGroups; ++g) {
      if constexpr (kTail) {
        Unit::add_to(y[t] + column, sum[t][g], n);
      } else {
        Unit::add_to(y[t] + column + g * kGroupColumns, sum[t][g]);
      }
    }
  }
}

template <class Unit, int kTokens, class Y>
void panel_tiles(const float* units, std::int64_t steps, const float* panel, Y* const* y,
                 std::int64_t column, std::int64_t columns) {
  constexpr int kGroups = Simd::kPanelGroups;
  const std::int64_t group_size = steps * kGroupColumns;
  std::int64_t c = 0;
  for (; c + kGroups * kGroupColumns <= columns; c += kGroups * kGroupColumns) {
    panel_tile<Unit, kTokens, kGroups, false>(units, steps, panel, y, column + c, 0);
    panel += kGroups * group_size;
  }
  if constexpr (kGroups > 1) {
    for (; c + kGroupColumns <= columns; c += kGroupColumns) {
      panel_tile<Unit, kTokens, 1, false>(units, steps, panel, y, column + c, 0);
      panel += group_size;
    }
  }
  if (c < columns) {
    panel_tile<Unit, kTokens, 1, true>(units, steps, panel, y, column + c,
                                       static_cast<int>(columns - c));
  }
}

// Into the second-level cache, while the panel before is in use: the columns [column, column +
// columns) of some rows.
template <class T>
TOPPINGS_INLINE void prefetch_columns(const T* row, std::int64_t column, std::int64_t columns) {
  constexpr std::int64_t kLine = 64 / std::int64_t{sizeof(T)};
  for (std::int64_t c = 0; c < columns; c += kLine) prefetch(row + column + c);
}

// units [tokens, steps]: v, scaled; y: the row of each token.
template <class Unit, class W, class Y>
void expand_panels(const ExpandArgs& args, const float* units, Y* const* y, float* panel) {
  constexpr int kTokens = Simd::kPanelTokens;
  const W* b = static_cast<const W*>(args.b);
  const std::int64_t steps = (args.ranks + Unit::kElements - 1) / Unit::kElements;
  const std::int64_t most = args.ranks <= kPanelRanks ? kPanelColumns : kPanelColumns / 2;
  for (std::int64_t column = 0; column < args.columns; column += most) {
    const std::int64_t next = column + most;
    const std::int64_t columns = next < args.columns ? most : args.columns - column;
    const std::int64_t next_columns = next + most < args.columns ? most : args.columns - next;
    fill_panel<Unit>(b + column, args.b_stride, args.ranks, columns, panel);
    std::int64_t token = 0, rank = 0;
    for (; token + kTokens <= args.tokens; token += kTokens) {
      // Every tile's share of the next panel's rows of B, and its own rows of y.
      for (; rank * args.tokens < args.ranks * (token + kTokens) && rank < args.ranks; ++rank) {
        prefetch_columns(b + rank * args.b_stride, next, next_columns);
      }
      for (int t = 0; t < kTokens; ++t) prefetch_columns(y[token + t], next, next_columns);
      panel_tiles<Unit, kTokens>(units + token * steps, steps, panel, y + token, column, columns);
    }
    if constexpr (kTokens > 2) {
      for (; token + 2 <= args.tokens; token += 2) {
        panel_tiles<Unit, 2>(units + token * steps, steps, panel, y + token, column, columns);
      }
    }
    for (; token < args.tokens; ++token) {
      panel_tiles<Unit, 1>(units + token * steps, steps, panel, y + token, column, columns);
    }
  }
}

}  // namespace
}  // namespace toppings::cpu
