// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/plan.cuh"
#include "cuda/product.cuh"
#include "cuda/slots.cuh"

// v = x A^T of one token tile over one unit of K: x and A pass through shared memory, x once for
// all rank rows of all projections that fit in a tile.
namespace toppings::cuda {

// The tokens of the tile, for the whole block, and its slot.
template <class Tile>
TOPPINGS_DEVICE std::int32_t load_tokens(const Thread& thread, const LoraParams& p,
                                         const TokenTile& tile, Scratch<Tile>& scratch) {
  const std::int32_t* tokens = scratch.work.tokens + tile.first;
  for (int i = thread.index; i < Tile::kTokens; i += kThreads<Tile>) {
    scratch.tokens[i] = i < tile.count ? load_generic<std::int32_t>(tokens + i) : -1;
  }
  return load_global_coherent<std::int32_t>(p.token_slots + load_generic<std::int32_t>(tokens));
}

// Rows of tokens and ranks that don't exist are left as they are: they only reach results that
// nobody reads.
template <class Math, class Tile>
TOPPINGS_DEVICE void load_shrink_stage(const Thread& thread, const LoraParams& p,
                                       const Scratch<Tile>& scratch, int num_groups, std::int32_t k,
                                       std::int32_t end, std::byte* stage) {
  constexpr int kChunks = kLineBytes / 16;
  const int index = static_cast<int>(opaque(static_cast<unsigned>(thread.index)));
  const int chunk = index % kChunks;
  k += chunk * kChunkNumbers<Math>;
  TOPPINGS_CUDA_ROLLED
  for (int row = index / kChunks; row < Tile::kTokens; row += kThreads<Tile> / kChunks) {
    const std::int32_t token = scratch.tokens[row];
    if (token < 0) continue;
    load_chunk<Math>(chunk_at(stage, kLineBytes, row, chunk),
                     element(p.x, p.dtype, token * p.x_stride), p.dtype, k, end);
  }
  std::byte* a = stage + Tile::kTokens * kLineBytes;
  TOPPINGS_CUDA_ROLLED
  for (int row = index / kChunks; row < num_groups * kRankGroup; row += kThreads<Tile> / kChunks) {
    const RankGroup& group = scratch.groups[row / kRankGroup];
    if (row % kRankGroup >= group.rows) continue;
    load_chunk<Math>(chunk_at(a, kLineBytes, row, chunk),
                     element(group.a, p.a_dtype, std::int64_t{row % kRankGroup} * p.in), p.a_dtype,
                     k, end);
  }
}

template <class Tile>
struct ShrinkShape {
  static constexpr int kRows = Tile::kTokens / 16 / Tile::kTokenWarps;
  static constexpr int kPairs = Tile::kRanks / kRankGroup / 2 / Tile::kColumnWarps;
};

template <class Tile, int kRows, int kPairs>
TOPPINGS_DEVICE void store_plane(const Thread& thread, const LoraParams& p,
                                 const Scratch<Tile>& scratch, const TokenTile& tile,
                                 int num_groups, int unit, const Accumulators<kRows, kPairs>& sum) {
  const int warp_row = thread.warp / Tile::kColumnWarps * kRows;
  const int warp_pair = thread.warp % Tile::kColumnWarps;
  float* plane = p.v.data + unit * p.v.plane_stride;
  TOPPINGS_CUDA_UNROLL
  for (int m = 0; m < kRows; ++m) {
    TOPPINGS_CUDA_UNROLL
    for (int n = 0; n < 2 * kPairs; ++n) {
      const int group = 2 * (warp_pair + n / 2 * Tile::kColumnWarps) + n % 2;
      if (group >= num_groups) continue;
      TOPPINGS_CUDA_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = 16 * (warp_row + m) + 8 * h + thread.row();
        if (row >= tile.count) continue;
        float* to = plane + (tile.first - p.window_begin + row) * p.v.row_stride +
                    scratch.groups[group].column + thread.column();
        store_global(to, Float2{sum.d[m][n][2 * h], sum.d[m][n][2 * h + 1]});
      }
    }
  }
}

// Rank tiles `first`, first + step, ... of the tile's slot, possibly none; all of them have been
// stored, and the stages are free again, when it returns.
template <class Math, class Tile>
TOPPINGS_DEVICE void shrink(const Thread& thread, const LoraParams& p, const TokenTile& tile,
                            std::int32_t slot, int unit, int first, int step,
                            Scratch<Tile>& scratch, std::byte* stages) {
  using Shape = ShrinkShape<Tile>;
  constexpr int kLine = kLineBytes / static_cast<int>(sizeof(Math));
  constexpr int kGroups = Tile::kRanks / kRankGroup;
  constexpr int kStage = kShrinkStageBytes<Tile>;
  const int warp_row = thread.warp / Tile::kColumnWarps * Shape::kRows;
  const int warp_pair = thread.warp % Tile::kColumnWarps;
  const int groups = rank_groups(p, slot);
  const std::int32_t begin = unit * p.chunk * p.chunks_per_unit;
  const std::int32_t left_in = p.in - begin;
  const std::int32_t numbers =
      left_in < p.chunk * p.chunks_per_unit ? left_in : p.chunk * p.chunks_per_unit;
  const int lines = (numbers + kLine - 1) / kLine;
  const int lines_per_chunk = p.chunk / kLine;

  for (int rank_tile = first; rank_tile * kGroups < groups; rank_tile += step) {
    const int left = groups - rank_tile * kGroups;
    const int num_groups = left < kGroups ? left : kGroups;
    if (thread.index < num_groups) {
      scratch.groups[thread.index] = rank_group(p, slot, rank_tile * kGroups + thread.index);
    }
    sync_block();
    const auto load = [&](int line) {
      if (line < lines) {
        load_shrink_stage<Math>(thread, p, scratch, num_groups, begin + line * kLine,
                                begin + numbers, stages + line % Tile::kStages * kStage);
      }
      commit_copies();
    };
    for (int line = 0; line < Tile::kStages - 1; ++line) load(line);
    Accumulators<Shape::kRows, Shape::kPairs> chunk, sum;
    int left_in_chunk = lines_per_chunk;
    for (int line = 0; line < lines; ++line) {
      wait_copies<Tile::kStages - 2>();
      sync_block();
      load(line + Tile::kStages - 1);
      const std::byte* stage = stages + line % Tile::kStages * kStage;
      multiply_lines<Math>(thread, chunk, stage, stage + Tile::kTokens * kLineBytes, warp_row,
                           tile.count, warp_pair, Tile::kColumnWarps, num_groups);
      if (--left_in_chunk == 0 || line == lines - 1) {
        left_in_chunk = lines_per_chunk;
        TOPPINGS_CUDA_UNROLL
        for (int m = 0; m < Shape::kRows; ++m) {
          TOPPINGS_CUDA_UNROLL
          for (int n = 0; n < 2 * Shape::kPairs; ++n) {
            TOPPINGS_CUDA_UNROLL
            for (int i = 0; i < 4; ++i) {
              sum.d[m][n][i] += chunk.d[m][n][i];
              chunk.d[m][n][i] = 0;
            }
          }
        }
      }
    }
    wait_copies<0>();
    store_plane(thread, p, scratch, tile, num_groups, unit, sum);
    sync_block();
  }
}

}  // namespace toppings::cuda
