// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/params.h"
#include "cuda/ptx.cuh"

// What the slot tables say about one adapter.
namespace toppings::cuda {

TOPPINGS_DEVICE const std::int64_t* slot_entry(const LoraParams& p, int projection,
                                               std::int32_t slot) {
  return p.slots + (projection * p.num_slots + slot) * 3;
}

// At most max_rank, whatever the table says: the workspace is that large.
TOPPINGS_DEVICE std::int32_t rank_of(const LoraParams& p, int projection, std::int32_t slot) {
  const auto rank = load_global_coherent<std::int64_t>(slot_entry(p, projection, slot) + 2);
  return static_cast<std::int32_t>(rank < 0 ? 0 : rank < p.max_rank ? rank : p.max_rank);
}

TOPPINGS_DEVICE int groups_of_rank(std::int32_t rank) {
  return (rank + kRankGroup - 1) / kRankGroup;
}

// Of all projections. The ranks are asked for at once: one wait, not one for each.
TOPPINGS_DEVICE int rank_groups(const LoraParams& p, std::int32_t slot) {
  std::int32_t ranks[kMaxProjections];
  TOPPINGS_CUDA_UNROLL
  for (int s = 0; s < kMaxProjections; ++s) {
    ranks[s] = s < p.num_projections ? rank_of(p, s, slot) : 0;
  }
  int groups = 0;
  TOPPINGS_CUDA_UNROLL
  for (int s = 0; s < kMaxProjections; ++s) groups += groups_of_rank(ranks[s]);
  return groups;
}

// The slot's rank rows are those of its projections one after another, each in groups of its own.
TOPPINGS_DEVICE RankGroup rank_group(const LoraParams& p, std::int32_t slot, int number) {
  for (int s = 0; s < p.num_projections; ++s) {
    const std::int32_t rank = rank_of(p, s, slot);
    if (number < groups_of_rank(rank)) {
      const std::int32_t row = number * kRankGroup;
      const auto offset = load_global_coherent<std::int64_t>(slot_entry(p, s, slot));
      const std::int64_t size = p.a_dtype == DType::f32 ? 4 : 2;
      return {.a = static_cast<const std::byte*>(p.a) + (offset + std::int64_t{row} * p.in) * size,
              .rows = rank - row < kRankGroup ? rank - row : kRankGroup,
              .column = static_cast<std::int32_t>(s * p.v.projection_stride) + row};
    }
    number -= groups_of_rank(rank);
  }
  return {.a = nullptr, .rows = 0, .column = 0};
}

}  // namespace toppings::cuda
