// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/memory.cuh"
#include "cuda/ptx.cuh"

// Products of tiles in shared memory. A warp holds 16 x 8 pieces of the result the way mma lays
// them out: with g = lane / 4 and i = 2 (lane % 4), rows g and g + 8, columns i and i + 1. Numbers
// of 16 bits go through mma; others, which no tensor core multiplies exactly, through FMAs on the
// same layout.
namespace toppings::cuda {

struct Thread {
  int index, lane, warp;  // in the block, in its warp; of the block

  TOPPINGS_DEVICE int row() const { return lane / 4; }
  TOPPINGS_DEVICE int column() const { return lane % 4 * 2; }
};

// Anew for each item: addresses that depend on the thread alone would otherwise be kept in
// registers over all items, all of both phases.
TOPPINGS_DEVICE Thread this_thread() {
  const auto index = static_cast<int>(opaque(thread_index().x));
  return {.index = index, .lane = index % 32, .warp = static_cast<int>(warp())};
}

template <int kRows, int kPairs>
struct Accumulators {
  float d[kRows][2 * kPairs][4] = {};
};

// One line of x times one line of A: acc[m][n] += x[16 (first_row + m)..] A[8 n..]^T, for the
// pairs of column groups first_pair + q * pair_step.
template <class Math, int kRows, int kPairs>
TOPPINGS_DEVICE void multiply_lines(const Thread& thread, Accumulators<kRows, kPairs>& acc,
                                    const std::byte* x, const std::byte* a, int first_row,
                                    int num_rows, int first_pair, int pair_step, int num_groups) {
  const int l = static_cast<int>(opaque(static_cast<unsigned>(thread.lane)));
  if constexpr (sizeof(Math) == 2) {
    TOPPINGS_CUDA_UNROLL
    for (int k = 0; k < 4; ++k) {
      std::uint32_t left[kRows][4];
      TOPPINGS_CUDA_UNROLL
      for (int m = 0; m < kRows; ++m) {
        const int row = 16 * (first_row + m);
        if (row < num_rows) {
          load_matrix_x4(left[m], chunk_at(x, kLineBytes, row + l % 16, 2 * k + l / 16));
        }
      }
      TOPPINGS_CUDA_UNROLL
      for (int q = 0; q < kPairs; ++q) {
        const int group = 2 * (first_pair + q * pair_step);
        if (group >= num_groups) continue;
        std::uint32_t r[4];
        load_matrix_x4(r,
                       chunk_at(a, kLineBytes, 8 * group + l % 8 + l / 16 * 8, 2 * k + l / 8 % 2));
        TOPPINGS_CUDA_UNROLL
        for (int m = 0; m < kRows; ++m) {
          if (16 * (first_row + m) < num_rows) {
            mma_16x8x16<Math>(acc.d[m][2 * q], left[m], {r[0], r[1]});
            mma_16x8x16<Math>(acc.d[m][2 * q + 1], left[m], {r[2], r[3]});
          }
        }
      }
    }
  } else {
    for (int chunk = 0; chunk < kLineBytes / 16; ++chunk) {
      TOPPINGS_CUDA_UNROLL
      for (int m = 0; m < kRows; ++m) {
        const int row = 16 * (first_row + m) + thread.row();
        if (row - thread.row() >= num_rows) continue;
        Vec16 left[2];
        TOPPINGS_CUDA_UNROLL
        for (int h = 0; h < 2; ++h) {
          left[h] = load_shared<Vec16>(chunk_at(x, kLineBytes, row + 8 * h, chunk));
        }
        TOPPINGS_CUDA_UNROLL
        for (int n = 0; n < 2 * kPairs; ++n) {
          const int group = 2 * (first_pair + n / 2 * pair_step) + n % 2;
          if (group >= num_groups) continue;
          TOPPINGS_CUDA_UNROLL
          for (int c = 0; c < 2; ++c) {
            const auto right =
                load_shared<Vec16>(chunk_at(a, kLineBytes, 8 * group + thread.column() + c, chunk));
            TOPPINGS_CUDA_UNROLL
            for (int h = 0; h < 2; ++h) {
              TOPPINGS_CUDA_UNROLL
              for (int i = 0; i < 4; ++i) {
                float& d = acc.d[m][n][2 * h + c];
                d = multiply_add(bit_cast<float>(left[h].w[i]), bit_cast<float>(right.w[i]), d);
              }
            }
          }
        }
      }
    }
  }
}

// A line of v (kRankStep numbers; those of 16 bits as high terms, then low ones) times as many rows
// of B, `ranks` of which count: acc[m][n] += v[16 (first_row + m)..] B[.., 8 (first_group + n)..].
template <class Math, int kRows, int kPairs>
TOPPINGS_DEVICE void multiply_columns(const Thread& thread, Accumulators<kRows, kPairs>& acc,
                                      const std::byte* v, const std::byte* b, int row_bytes,
                                      int ranks, int first_row, int num_rows, int first_group) {
  const int l = static_cast<int>(opaque(static_cast<unsigned>(thread.lane)));
  if constexpr (sizeof(Math) == 2) {
    constexpr int kPairsAtOnce = kPairs < 2 ? kPairs : 2;
    TOPPINGS_CUDA_UNROLL
    for (int k = 0; k < kRankStep / 16; ++k) {
      if (16 * k >= ranks) break;
      TOPPINGS_CUDA_UNROLL
      for (int first = 0; first < kPairs; first += kPairsAtOnce) {
        std::uint32_t right[kPairsAtOnce][4];
        TOPPINGS_CUDA_UNROLL
        for (int q = 0; q < kPairsAtOnce; ++q) {
          load_matrix_x4_transposed(right[q], chunk_at(b, row_bytes, 16 * k + l % 16,
                                                       first_group + 2 * (first + q) + l / 16));
        }
        TOPPINGS_CUDA_UNROLL
        for (int term = 1; term >= 0; --term) {  // the low one first
          TOPPINGS_CUDA_UNROLL
          for (int m = 0; m < kRows; ++m) {
            const int row = 16 * (first_row + m);
            if (row >= num_rows) continue;
            std::uint32_t left[4];
            load_matrix_x4(left, chunk_at(v, kLineBytes, row + l % 16, 4 * term + 2 * k + l / 16));
            TOPPINGS_CUDA_UNROLL
            for (int q = 0; q < kPairsAtOnce; ++q) {
              mma_16x8x16<Math>(acc.d[m][2 * (first + q)], left, {right[q][0], right[q][1]});
              mma_16x8x16<Math>(acc.d[m][2 * (first + q) + 1], left, {right[q][2], right[q][3]});
            }
          }
        }
      }
    }
  } else {
    for (int chunk = 0; chunk < kLineBytes / 16; ++chunk) {
      if (4 * chunk >= ranks) break;
      TOPPINGS_CUDA_UNROLL
      for (int m = 0; m < kRows; ++m) {
        const int row = 16 * (first_row + m) + thread.row();
        if (row - thread.row() >= num_rows) continue;
        Vec16 left[2];
        TOPPINGS_CUDA_UNROLL
        for (int h = 0; h < 2; ++h) {
          left[h] = load_shared<Vec16>(chunk_at(v, kLineBytes, row + 8 * h, chunk));
        }
        TOPPINGS_CUDA_UNROLL
        for (int i = 0; i < 4; ++i) {
          TOPPINGS_CUDA_UNROLL
          for (int n = 0; n < 2 * kPairs; ++n) {
            const auto right = load_shared<Float2>(
                chunk_at(b, row_bytes, 4 * chunk + i, 2 * (first_group + n) + thread.column() / 4) +
                thread.column() % 4 * 4);
            TOPPINGS_CUDA_UNROLL
            for (int h = 0; h < 2; ++h) {
              const float value = bit_cast<float>(left[h].w[i]);
              acc.d[m][n][2 * h] = multiply_add(value, right.x, acc.d[m][n][2 * h]);
              acc.d[m][n][2 * h + 1] = multiply_add(value, right.y, acc.d[m][n][2 * h + 1]);
            }
          }
        }
      }
    }
  }
}

}  // namespace toppings::cuda
