// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace toppings::cpu {

// A plan on the CPU, 2T + 2 numbers: G, then the tokens that have an adapter (by ascending slot, in
// batch order within a slot, the rest -1), then where each of the G segments of equal slots begins
// in that list, and its end (the rest -1).
struct PlanView {
  std::int32_t num_segments;
  const std::int32_t* tokens;  // [T]
  const std::int32_t* begins;  // [T + 1]

  PlanView(const std::int32_t* plan, std::int64_t num_tokens)
      : num_segments(plan[0]), tokens(plan + 1), begins(plan + 1 + num_tokens) {}
};

// Throws invalid_argument unless `plan` is exactly what lora_plan makes of these token_slots.
void check_plan(const std::int32_t* plan, const std::int32_t* token_slots, std::int64_t num_tokens,
                std::int64_t num_slots);

}  // namespace toppings::cpu
