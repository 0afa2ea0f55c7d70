// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/lora_args.h>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace toppings::cpu {

// One segment (the tokens of one slot) through one projection.
struct Product {
  const std::int32_t* tokens;
  std::int64_t num_tokens, rank, width;
  std::int64_t projection, column;  // column: where the projection begins in y
  const std::byte* a;               // null in expand
  const std::byte* b;               // null in shrink
  float scale;
  std::int64_t v_begin;  // in the workspace's v, when shrink and expand are separate phases
};

// Checks of the arguments, all of them before anything is written. check_y returns the columns of
// y.
void check_batch(const LoraBatch& batch);
void check_x(const LoraForward& args);
std::int64_t check_y(const LoraForward& args);
void check_alias(const LoraForward& args, std::int64_t y_columns);

// The plan, given (and checked) or built into `built_plan`, and from it the products; those of rank
// 0 are left out.
void resolve(const LoraForward& args, bool uses_a, bool uses_b,
             std::vector<std::int32_t>& built_plan, std::vector<Product>& products);

}  // namespace toppings::cpu
