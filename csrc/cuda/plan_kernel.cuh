// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/launch_config.h"
#include "cuda/ptx.cuh"

// lora_plan of any number of tokens: a stable radix sort by one block. It runs once a step, so one
// multiprocessor is enough, and nothing but the plan itself is needed as memory.
namespace toppings::cuda {

struct PlanParams {
  const std::int32_t* token_slots;  // [T]
  std::int32_t* plan;               // [2T + 2]
  std::int64_t num_slots;
  std::int32_t tokens;
};

inline constexpr int kPlanWarps = 16;
inline constexpr int kDigits = 256;

struct PlanScratch {
  std::int32_t counts[kPlanWarps][kDigits];  // then: where a warp's tokens of a digit go
  std::int32_t totals[kDigits];
  std::int32_t warps[kPlanWarps];
};

inline LaunchConfig plan_launch(void* stream = nullptr) {
  return {.grid = {1},
          .block = {kPlanWarps * 32},
          .shared_bytes = sizeof(PlanScratch),
          .stream = stream};
}

// The tokens of a list, or, before the first pass, of the whole batch.
struct PlanList {
  const std::int32_t* tokens;  // null: 0, 1, 2, ...
  std::int32_t count;
};

// Calls f(token, slot, is one) for the warp's share of the list, 32 at a time and in order; all
// lanes take part.
template <class F>
TOPPINGS_DEVICE void for_each_token(const PlanParams& p, const PlanList& list, F f) {
  const std::int32_t share = (list.count + kPlanWarps * 32 - 1) / (kPlanWarps * 32) * 32;
  const std::int32_t begin = static_cast<std::int32_t>(warp()) * share;
  const std::int32_t end = begin + share < list.count ? begin + share : list.count;
  for (std::int32_t first = begin; first < end; first += 32) {
    const std::int32_t i = first + static_cast<std::int32_t>(lane());
    std::int32_t token = i, slot = -1;
    if (i < end) {
      if (list.tokens != nullptr) token = load_global_coherent<std::int32_t>(list.tokens + i);
      slot = load_global_coherent<std::int32_t>(p.token_slots + token);
    }
    f(i, token, slot, slot >= 0 && slot < p.num_slots);
  }
}

// Stable sort by one digit of the slot; tokens without an adapter are dropped. The block's.
TOPPINGS_DEVICE std::int32_t sort_by_digit(const PlanParams& p, const PlanList& list, int shift,
                                           PlanScratch& scratch, std::int32_t* to) {
  const auto thread = static_cast<int>(thread_index().x);
  std::int32_t* counts = scratch.counts[warp()];
  for (int d = static_cast<int>(lane()); d < kDigits; d += 32) {
    store_shared(counts + d, std::int32_t{0});
  }
  sync_warp();

  // Lanes of the same digit, and how many of them are lower.
  const auto peers_of = [&](std::int32_t digit, bool valid) {
    std::uint32_t peers = ballot(valid);
    for (int bit = 0; bit < 8; ++bit) {
      const bool one = (digit >> bit & 1) != 0;
      const std::uint32_t ones = ballot(one);
      peers &= one ? ones : ~ones;
    }
    return peers;
  };
  const auto for_each_digit = [&](auto f) {
    for_each_token(p, list, [&](std::int32_t, std::int32_t token, std::int32_t slot, bool valid) {
      const std::int32_t digit = slot >> shift & (kDigits - 1);
      const std::uint32_t peers = peers_of(digit, valid);
      const int rank = count_bits(peers & ((1u << lane()) - 1));
      const std::int32_t base = valid ? load_shared<std::int32_t>(counts + digit) : 0;
      if (valid) f(token, base + rank);
      sync_warp();
      if (valid && rank == 0) store_shared(counts + digit, base + count_bits(peers));
      sync_warp();
    });
  };
  for_each_digit([](std::int32_t, std::int32_t) {});
  sync_block();

  if (thread < kDigits) {
    std::int32_t total = 0;
    for (int w = 0; w < kPlanWarps; ++w)
      total += load_shared<std::int32_t>(&scratch.counts[w][thread]);
    store_shared(scratch.totals + thread, total);
  }
  sync_block();
  std::int32_t all = 0, before = 0;
  for (int d = 0; d < kDigits; ++d) {
    if (d == thread) before = all;
    all += load_shared<std::int32_t>(scratch.totals + d);
  }
  if (thread < kDigits) {
    for (int w = 0; w < kPlanWarps; ++w) {
      const auto count = load_shared<std::int32_t>(&scratch.counts[w][thread]);
      store_shared(&scratch.counts[w][thread], before);
      before += count;
    }
  }
  sync_block();
  for_each_digit(
      [&](std::int32_t token, std::int32_t position) { store_global(to + position, token); });
  sync_block();
  return all;
}

// Where the slot changes in the sorted list.
TOPPINGS_DEVICE std::int32_t find_segments(const PlanParams& p, const PlanList& list,
                                           PlanScratch& scratch, std::int32_t* begins) {
  const auto for_each_begin = [&](auto f) {
    for_each_token(p, list, [&](std::int32_t i, std::int32_t, std::int32_t slot, bool valid) {
      bool begins_here = valid;
      if (valid && i > 0) {
        const auto before = load_global_coherent<std::int32_t>(list.tokens + i - 1);
        begins_here = load_global_coherent<std::int32_t>(p.token_slots + before) != slot;
      }
      f(i, begins_here, ballot(begins_here));
    });
  };
  std::int32_t count = 0;
  for_each_begin([&](std::int32_t, bool, std::uint32_t all) { count += count_bits(all); });
  if (lane() == 0) store_shared(scratch.warps + warp(), count);
  sync_block();
  std::int32_t segments = 0, next = 0;
  for (int w = 0; w < kPlanWarps; ++w) {
    if (w == static_cast<int>(warp())) next = segments;
    segments += load_shared<std::int32_t>(scratch.warps + w);
  }
  for_each_begin([&](std::int32_t i, bool begins_here, std::uint32_t all) {
    if (begins_here) store_global(begins + next + count_bits(all & ((1u << lane()) - 1)), i);
    next += count_bits(all);
  });
  return segments;
}

TOPPINGS_KERNEL TOPPINGS_LAUNCH_BOUNDS(kPlanWarps * 32)
    plan_kernel(const TOPPINGS_GRID_CONSTANT PlanParams p) {
  auto& scratch = *reinterpret_cast<PlanScratch*>(dynamic_shared());
  const auto thread = static_cast<std::int32_t>(thread_index().x);
  wait_for_previous_kernel();
  std::int32_t* tokens = p.plan + 1;
  std::int32_t* begins = p.plan + 1 + p.tokens;

  // The place of the begins holds every other pass's list, so that the last one lands in its own.
  int passes = 1;
  while (passes < 4 && (p.num_slots - 1) >> (8 * passes) > 0) ++passes;
  PlanList list{.tokens = nullptr, .count = p.tokens};
  for (int pass = 0; pass < passes; ++pass) {
    std::int32_t* to = (passes - pass) % 2 == 1 ? tokens : begins;
    list.count = sort_by_digit(p, list, 8 * pass, scratch, to);
    list.tokens = to;
  }
  const std::int32_t segments = find_segments(p, list, scratch, begins);
  if (thread == 0) {
    store_global(p.plan, segments);
    store_global(begins + segments, list.count);
  }
  for (std::int32_t i = list.count + thread; i < p.tokens; i += kPlanWarps * 32) {
    store_global(tokens + i, std::int32_t{-1});
  }
  for (std::int32_t i = segments + 1 + thread; i <= p.tokens; i += kPlanWarps * 32) {
    store_global(begins + i, std::int32_t{-1});
  }
}

}  // namespace toppings::cuda
