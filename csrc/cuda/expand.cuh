// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/planes.cuh"
#include "cuda/slots.cuh"

// y += scale v B of one token tile and one range of columns. B and y are on their way before v is
// waited for.
namespace toppings::cuda {

template <class Math, class Tile>
inline constexpr int kTileColumns = Tile::kColumnBytes / static_cast<int>(sizeof(Math));

template <class Math, class Tile>
struct ExpandShape {
  static constexpr int kRows = Tile::kTokens / 16 / Tile::kTokenWarps;
  static constexpr int kPairs = kTileColumns<Math, Tile> / 16 / Tile::kColumnWarps;
};

// Calls f(row, chunk, address in the tile) for the chunks of y that exist.
template <class Math, class Tile, class F>
TOPPINGS_DEVICE void for_each_chunk_of_y(const Thread& thread, const TokenTile& tile, std::byte* y,
                                         F f) {
  constexpr int kChunks = Tile::kColumnBytes / 16;
  TOPPINGS_CUDA_ROLLED
  for (int i = thread.index; i < tile.count * kChunks; i += kThreads<Tile>) {
    f(i / kChunks, i % kChunks, chunk_at(y, Tile::kColumnBytes, i / kChunks, i % kChunks));
  }
}

template <class Math, class Tile>
TOPPINGS_DEVICE void load_expand_stage(const Thread& thread, const LoraParams& p,
                                       const std::byte* b, std::int32_t width, std::int32_t column,
                                       int first, int rank, std::byte* stage) {
  constexpr int kChunks = Tile::kColumnBytes / 16;
  // A product takes whole steps of 16 rows (4 for fp32), so what lies beyond the rank must be 0.
  const int rows = rank - first < kRankStep ? (rank - first + 15) / 16 * 16 : kRankStep;
  TOPPINGS_CUDA_ROLLED
  for (int i = thread.index; i < rows * kChunks; i += kThreads<Tile>) {
    const int row = i / kChunks, chunk = i % kChunks;
    std::byte* to = chunk_at(stage, Tile::kColumnBytes, row, chunk);
    if (first + row < rank) {
      load_chunk<Math>(to, element(b, p.b_dtype, std::int64_t{first + row} * width), p.b_dtype,
                       column + chunk * kChunkNumbers<Math>, width);
    } else {
      store_shared(to, Vec16{});
    }
  }
}

// y's tile in shared memory: y + scale * sum, rounded to what the tile holds.
template <class Math, class Tile, int kRows, int kPairs>
TOPPINGS_DEVICE void add_to_y(const Thread& thread, const LinesOfV<Math, Tile>& v,
                              const Accumulators<kRows, kPairs>& sum, float scale, int first_row,
                              int first_group, int num_rows, std::byte* y) {
  TOPPINGS_CUDA_UNROLL
  for (int m = 0; m < kRows; ++m) {
    TOPPINGS_CUDA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * (first_row + m) + 8 * h + thread.row();
      if (row >= num_rows) continue;
      const float factor = v.factor(row);
      TOPPINGS_CUDA_UNROLL
      for (int n = 0; n < 2 * kPairs; ++n) {
        const float a = sum.d[m][n][2 * h] * factor, b = sum.d[m][n][2 * h + 1] * factor;
        if constexpr (sizeof(Math) == 2) {
          std::byte* at =
              chunk_at(y, Tile::kColumnBytes, row, first_group + n) + thread.column() * 2;
          const Float2 old = unpack2<Math>(load_shared<std::uint32_t>(at));
          store_shared(at,
                       pack2<Math>(multiply_add(scale, a, old.x), multiply_add(scale, b, old.y)));
        } else {
          std::byte* at =
              chunk_at(y, Tile::kColumnBytes, row, 2 * (first_group + n) + thread.column() / 4) +
              thread.column() % 4 * 4;
          const auto old = load_shared<Float2>(at);
          store_shared(at, Float2{multiply_add(scale, a, old.x), multiply_add(scale, b, old.y)});
        }
      }
    }
  }
}

// Columns [column, column + kTileColumns) of a projection. wait() returns when v is complete.
template <class Math, class Tile, class Wait>
TOPPINGS_DEVICE void expand(const Thread& thread, const LoraParams& p, const TokenTile& tile,
                            std::int32_t slot, int projection, std::int32_t column,
                            Scratch<Tile>& scratch, std::byte* stages, Wait wait) {
  using Shape = ExpandShape<Math, Tile>;
  const int rank = rank_of(p, projection, slot);
  if (rank == 0) return;
  const auto b_offset = load_global_coherent<std::int64_t>(slot_entry(p, projection, slot) + 1);
  const auto scale = load_global_coherent<float>(p.scales + projection * p.num_slots + slot);
  const std::byte* b = element(p.b, p.b_dtype, b_offset);
  const std::int32_t begin = p.columns[projection], end = p.columns[projection + 1];
  std::byte* y = stages + 2 * kExpandStageBytes<Tile>;
  const auto stage = [&](int step) { return stages + step % 2 * kExpandStageBytes<Tile>; };
  const auto load = [&](int step) {
    if (step * kRankStep < rank) {
      load_expand_stage<Math, Tile>(thread, p, b, end - begin, column, step * kRankStep, rank,
                                    stage(step));
    }
  };

  load(0);
  for_each_chunk_of_y<Math, Tile>(thread, tile, y, [&](int row, int chunk, std::byte* at) {
    load_chunk<Math>(at, element(p.y, p.dtype, scratch.tokens[row] * p.y_stride), p.dtype,
                     begin + column + chunk * kChunkNumbers<Math>, end);
  });
  commit_copies();
  load(1);
  commit_copies();
  wait();

  const LinesOfV<Math, Tile> v(thread, p, tile, projection, rank, scratch);
  const int warp_row = thread.warp / Tile::kColumnWarps * Shape::kRows;
  const int warp_group = thread.warp % Tile::kColumnWarps * 2 * Shape::kPairs;
  Accumulators<Shape::kRows, Shape::kPairs> sum;
  for (int step = 0; step * kRankStep < rank; ++step) {
    std::byte* lines = stage(step) + kRankStep * Tile::kColumnBytes;
    v.store(step * kRankStep, lines);
    wait_copies<1>();
    sync_block();
    multiply_columns<Math>(thread, sum, lines, stage(step), Tile::kColumnBytes,
                           rank - step * kRankStep, warp_row, tile.count, warp_group);
    sync_block();
    load(step + 2);
    commit_copies();
  }
  wait_copies<0>();

  add_to_y(thread, v, sum, scale, warp_row, warp_group, tile.count, y);
  sync_block();
  for_each_chunk_of_y<Math, Tile>(thread, tile, y, [&](int row, int chunk, const std::byte* at) {
    store_chunk<Math>(
        at, const_cast<std::byte*>(element(p.y, p.dtype, scratch.tokens[row] * p.y_stride)),
        p.dtype, begin + column + chunk * kChunkNumbers<Math>, end);
  });
}

// v itself, for lora_shrink.
template <class Tile>
TOPPINGS_DEVICE void write_v(const Thread& thread, const LoraParams& p, const TokenTile& tile,
                             std::int32_t slot, const Scratch<Tile>& scratch) {
  for (int s = 0; s < p.num_projections; ++s) {
    const int rank = rank_of(p, s, slot);
    const int quads = (rank + 3) / 4;
    TOPPINGS_CUDA_ROLLED
    for (int i = thread.index; i < tile.count * quads; i += kThreads<Tile>) {
      const int row = i / quads, column = i % quads * 4;
      float v[4];
      load_v<Tile::kPlanesAtOnce>(p.v, tile.first - p.window_begin + row, s, column, rank, 0,
                                  p.v.count, v);
      float* to =
          p.v_out + (std::int64_t{s} * p.tokens + scratch.tokens[row]) * p.max_rank + column;
      for (int j = 0; j < 4 && column + j < rank; ++j) store_global(to + j, v[j]);
    }
  }
}

}  // namespace toppings::cuda
