// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/params.h"
#include "cuda/ptx.cuh"

// The plan as the kernels see it (lora_plan.h has its layout), and the token tiles of a window.
namespace toppings::cuda {

// Four numbers of shared memory at once; `f(number, index)` of each.
template <class F>
TOPPINGS_DEVICE void for_each_number(const std::int32_t* numbers, std::int32_t count, F f) {
  for (std::int32_t i = 0; i < count; i += 4) {
    const auto four = load_shared<Vec16>(numbers + i);
    TOPPINGS_CUDA_UNROLL
    for (int j = 0; j < 4; ++j) f(static_cast<std::int32_t>(four.w[j]), i + j);
  }
}

// The plan of at most kSmallBatch tokens, by the whole block, in shared memory: every token counts
// those that come before it. `scratch`: 2 * kSmallBatch numbers for the time of the call.
TOPPINGS_DEVICE void make_small_plan(const LoraParams& p, std::int32_t* scratch,
                                     std::int32_t* plan) {
  constexpr std::int32_t kNone = 0x7fffffff;
  const auto thread = static_cast<std::int32_t>(thread_index().x);
  const auto threads = static_cast<std::int32_t>(block_size().x);
  const std::int32_t padded = (p.tokens + 3) / 4 * 4;
  std::int32_t* slots = scratch;                 // kNone: no adapter
  std::int32_t* firsts = scratch + kSmallBatch;  // the slot at its first token, else kNone
  std::int32_t* order = plan + 1;
  std::int32_t* begins = plan + 1 + p.tokens;
  for (std::int32_t t = thread; t < padded; t += threads) {
    const std::int32_t slot =
        t < p.tokens ? load_global_coherent<std::int32_t>(p.token_slots + t) : -1;
    store_shared(slots + t, slot >= 0 && slot < p.num_slots ? slot : kNone);
  }
  sync_block();
  for (std::int32_t t = thread; t < padded; t += threads) {
    const auto slot = load_shared<std::int32_t>(slots + t);
    std::int32_t position = 0, earlier = 0;
    for_each_number(slots, padded, [&](std::int32_t other, std::int32_t u) {
      position += other < slot || (other == slot && u < t) ? 1 : 0;
      earlier += other == slot && u < t ? 1 : 0;
    });
    store_shared(firsts + t, earlier == 0 ? slot : kNone);
    if (slot != kNone) order[position] = t;
  }
  sync_block();
  for (std::int32_t t = thread; t < padded; t += threads) {
    const auto slot = load_shared<std::int32_t>(firsts + t);
    if (slot == kNone) continue;
    std::int32_t segment = 0, begin = 0;
    for_each_number(firsts, padded,
                    [&](std::int32_t other, std::int32_t) { segment += other < slot ? 1 : 0; });
    for_each_number(slots, padded,
                    [&](std::int32_t other, std::int32_t) { begin += other < slot ? 1 : 0; });
    begins[segment] = begin;
  }
  if (thread == 0) {
    std::int32_t segments = 0, count = 0;
    for_each_number(firsts, padded,
                    [&](std::int32_t slot, std::int32_t) { segments += slot != kNone ? 1 : 0; });
    for_each_number(slots, padded,
                    [&](std::int32_t slot, std::int32_t) { count += slot != kNone ? 1 : 0; });
    plan[0] = segments;
    begins[segments] = count;
  }
  sync_block();
}

// Tokens of one segment.
struct TokenTile {
  std::int32_t first;  // position in the plan's list
  std::int32_t count;  // may be 0
};

// The first of the plan's segments of which `is_beyond` holds; it holds of all after it.
template <class F>
TOPPINGS_DEVICE std::int32_t lower_bound(std::int32_t segments, F is_beyond) {
  std::int32_t low = 0, high = segments;
  while (low < high) {
    const std::int32_t middle = low + (high - low) / 2;
    if (is_beyond(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Where a segment begins in the window.
TOPPINGS_DEVICE std::int32_t begin_of(const Work& work, std::int32_t segment) {
  const auto begin = load_generic<std::int32_t>(work.begins + segment);
  return (begin < work.window_begin ? work.window_begin
          : begin < work.window_end ? begin
                                    : work.window_end) -
         work.window_begin;
}

// The tiles of kTokens tokens in a window of the plan. Segment g has the numbers from
// floor(begin_of(g) / kTokens) + g on: enough of them for any length, one too many at times, and
// found without a sum over all segments before it.
template <int kTokens>
TOPPINGS_DEVICE void find_tiles(const LoraParams& p, const std::int32_t* plan,
                                const std::int32_t* begins, Work& work) {
  const auto segments = load_generic<std::int32_t>(plan);
  const auto begin_at = [&](std::int32_t g) { return load_generic<std::int32_t>(begins + g); };
  work.tokens = plan + 1;
  work.begins = begins;
  const std::int32_t count = begin_at(segments);
  work.window_begin = p.window_begin;
  work.window_end = p.window_end < count ? p.window_end : count;
  work.first_segment = 0;
  work.last_segment = segments;
  work.tiles = 0;
  if (work.window_end <= work.window_begin) return;
  if (work.window_begin > 0) {
    work.first_segment =
        lower_bound(segments, [&](std::int32_t g) { return begin_at(g + 1) > work.window_begin; });
  }
  if (work.window_end < count) {
    work.last_segment =
        lower_bound(segments, [&](std::int32_t g) { return begin_at(g) >= work.window_end; });
  }
  const std::int32_t tiles =
      (work.window_end - work.window_begin) / kTokens + work.last_segment - work.first_segment;
  // A plan of this batch never has more; one of another must not reach beyond the counters.
  work.tiles = tiles < 0 ? 0 : tiles < kMaxTiles ? tiles : kMaxTiles;
}

template <int kTokens>
TOPPINGS_DEVICE TokenTile tile_of(const Work& work, std::int32_t number) {
  // The last segment whose first number isn't beyond this one.
  std::int32_t low = work.first_segment, high = work.last_segment;
  while (high - low > 1) {
    const std::int32_t middle = low + (high - low) / 2;
    if (begin_of(work, middle) / kTokens + middle - work.first_segment <= number) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const std::int32_t begin = begin_of(work, low);
  const std::int32_t offset = (number - begin / kTokens - (low - work.first_segment)) * kTokens;
  const std::int32_t left = begin_of(work, low + 1) - begin - offset;
  return {work.window_begin + begin + offset, left < 0 ? 0 : left < kTokens ? left : kTokens};
}

}  // namespace toppings::cuda
