// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "range_allocator.h"

namespace toppings {

using Ranges = std::span<const RangeAllocator::Range>;

// The cheapest run of adjacent ranges that make `need` bytes (> 0) together, the one at the lowest
// address of equals; empty when there is none. cost(range): >= 0, infinite for one that must stay.
template <class Cost>
Ranges cheapest_window(Ranges ranges, std::int64_t need, Cost cost) {
  Ranges best;
  double best_cost = 0;
  std::size_t first = 0;
  std::int64_t bytes = 0;
  for (std::size_t last = 0; last < ranges.size(); ++last) {
    if (std::isinf(cost(ranges[last]))) {
      first = last + 1;
      bytes = 0;
      continue;
    }
    bytes += ranges[last].bytes;
    // Of the windows that end here the shortest one is the cheapest, since no cost is negative.
    while (bytes - ranges[first].bytes >= need) bytes -= ranges[first++].bytes;
    if (bytes < need) continue;
    const Ranges window = ranges.subspan(first, last + 1 - first);
    double window_cost = 0;
    for (const RangeAllocator::Range& range : window) window_cost += cost(range);
    if (!best.empty() && window_cost >= best_cost) continue;
    best = window;
    best_cost = window_cost;
  }
  return best;
}

// The cheapest range in use that needn't stay, the one at the lowest address of equals; empty when
// there is none.
template <class Cost>
Ranges cheapest_used(Ranges ranges, Cost cost) {
  Ranges best;
  for (std::size_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].owner == RangeAllocator::kFree || std::isinf(cost(ranges[i]))) continue;
    if (best.empty() || cost(ranges[i]) < cost(best.front())) best = ranges.subspan(i, 1);
  }
  return best;
}

}  // namespace toppings
