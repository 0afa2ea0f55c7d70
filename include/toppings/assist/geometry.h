// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace toppings::assist {

// Of a channel: its slots, and what one of them holds at most. Deltas have room twice.
struct Geometry {
  int num_slots;
  std::int64_t x_bytes, deltas_bytes;
};

}  // namespace toppings::assist
