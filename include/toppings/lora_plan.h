// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>

#include <cstdint>

namespace toppings {

// Tokens grouped by slot, made once a step and shared by all layers. token_slots outside [-1, L) is
// an error.
TOPPINGS_EXPORT std::int64_t lora_plan_size(std::int64_t tokens, std::int64_t num_slots);
TOPPINGS_EXPORT void lora_plan(const std::int32_t* token_slots, std::int64_t tokens,
                               std::int64_t num_slots, std::int32_t* plan);

}  // namespace toppings
