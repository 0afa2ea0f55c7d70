// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/dtype.h>

#include <cstdint>

#include "cuda/tile.h"

// What the kernels get: pointers into the GPU's memory, and the host's choices (config.h).
namespace toppings::cuda {

// v in memory, possibly still as parts of its sums along K: planes to be added.
struct Planes {
  float* data;
  std::int64_t plane_stride, row_stride, projection_stride;  // in floats
  std::int32_t count, per_part;  // first the planes of a part are added, then the parts
  bool by_token;                 // rows are tokens of the batch, else positions in the window
};

struct LoraParams {
  const std::int64_t* slots;        // [S, L, 3]
  const float* scales;              // [S, L]
  const std::int32_t* token_slots;  // [T]
  const std::int32_t* plan;         // [2T + 2]; null: made by every block
  std::int64_t num_slots;           // L
  std::int32_t tokens;              // T
  std::int32_t num_projections;     // S <= kMaxProjections
  std::int32_t max_rank;
  DType dtype, a_dtype, b_dtype;  // of x and y, a, b

  // The positions of the plan's list that this launch works on.
  std::int32_t window_begin, window_end;

  // Shrink; null x: v is given. An item is a unit of a tile's sums along K, one plane of v each.
  const void* x;  // [T, K]
  const void* a;
  std::int64_t x_stride;
  std::int32_t in;  // K
  std::int32_t chunk, chunks_per_unit, units;
  std::int32_t wanted_items;  // tiles with fewer shrink items than that are split by ranks too
  Planes v;

  // Expand; null y: v_out is written instead.
  void* y;  // [T, columns[S]]
  const void* b;
  std::int64_t y_stride;
  std::int32_t columns[kMaxProjections + 1];  // where each projection begins in y
  float* v_out;                               // [S, T, max_rank], zeros before the launch

  // [ticket, blocks that ended, finished shrink items of every tile], all 0 before and after a
  // launch.
  std::uint32_t* counters;
};

}  // namespace toppings::cuda
