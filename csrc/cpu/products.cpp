// SPDX-License-Identifier: Apache-2.0
#include "cpu/products.h"

#include <toppings/error.h>
#include <toppings/lora_plan.h>

#include <iterator>
#include <string>

#include "check.h"
#include "cpu/plan.h"

namespace toppings::cpu {
namespace {

void check_at_least(const char* what, std::int64_t value, std::int64_t least) {
  if (value < least)
    fail(Status::invalid_argument, what, ">= " + std::to_string(least), std::to_string(value));
}

void check_block(const char* what, std::int64_t offset, std::int64_t rank, std::int64_t row,
                 std::int64_t size, std::int64_t slot, std::int64_t projection) {
  if (offset >= 0 && rank <= size / row && offset <= size - rank * row) return;
  fail(Status::invalid_argument,
       std::string("slots[") + std::to_string(projection) + ", " + std::to_string(slot) + "]",
       std::to_string(rank) + " x " + std::to_string(row) + " elements within the " +
           std::to_string(size) + " of " + what,
       "offset " + std::to_string(offset));
}

}  // namespace

void check_batch(const LoraBatch& batch) {
  check_at_least("tokens", batch.tokens, 0);
  check_at_least("num_slots", batch.num_slots, 0);
  check_at_least("num_projections", batch.num_projections, 0);
  check_at_least("max_rank", batch.max_rank, 0);
}

void check_x(const LoraForward& args) {
  check_at_least("in", args.in, 1);
  if (args.batch.tokens > 1) check_at_least("x_stride", args.x_stride, 0);
}

std::int64_t check_y(const LoraForward& args) {
  if (std::ssize(args.widths) != args.batch.num_projections) {
    fail(Status::invalid_argument, "widths",
         std::to_string(args.batch.num_projections) + " of them, one for each projection",
         std::to_string(args.widths.size()));
  }
  std::int64_t sum = 0;
  for (const std::int64_t width : args.widths) {
    check_at_least("width", width, 1);
    sum += width;
  }
  if (args.batch.tokens > 1) check_at_least("y_stride", args.y_stride, sum);
  return sum;
}

// Do rows of x and of y share a byte? Columns of one buffer that lie side by side don't.
void check_alias(const LoraForward& args, std::int64_t y_columns) {
  if (args.batch.tokens == 0) return;
  const auto size = static_cast<std::int64_t>(size_of(args.dtype));
  const auto x = reinterpret_cast<std::intptr_t>(args.x),
             y = reinterpret_cast<std::intptr_t>(args.y);
  const std::int64_t x_row = args.in * size, y_row = y_columns * size;
  const std::int64_t x_stride = args.x_stride * size, y_stride = args.y_stride * size;
  const std::int64_t last = args.batch.tokens - 1;
  if (x + last * x_stride + x_row <= y || y + last * y_stride + y_row <= x) return;
  if (last > 0 && x_stride == y_stride && x_stride > 0) {
    const std::int64_t offset = ((y - x) % x_stride + x_stride) % x_stride;
    if (offset >= x_row && offset + y_row <= x_stride) return;
  }
  fail(Status::invalid_argument, "x", "memory of its own", "memory that overlaps y");
}

void resolve(const LoraForward& args, bool uses_a, bool uses_b,
             std::vector<std::int32_t>& built_plan, std::vector<Product>& products) {
  const LoraBatch& batch = args.batch;
  const std::int32_t* plan = batch.plan;
  if (plan != nullptr) {
    check_plan(plan, batch.token_slots, batch.tokens, batch.num_slots);
  } else {
    built_plan.resize(static_cast<std::size_t>(lora_plan_size(batch.tokens, batch.num_slots)));
    lora_plan(batch.token_slots, batch.tokens, batch.num_slots, built_plan.data());
    plan = built_plan.data();
  }
  const PlanView view(plan, batch.tokens);
  const auto a_size = static_cast<std::int64_t>(size_of(args.a_dtype));
  const auto b_size = static_cast<std::int64_t>(size_of(args.b_dtype));

  products.clear();
  std::int64_t v_size = 0;
  for (std::int32_t segment = 0; segment < view.num_segments; ++segment) {
    const std::int32_t* tokens = view.tokens + view.begins[segment];
    const std::int64_t num_tokens = view.begins[segment + 1] - view.begins[segment];
    const std::int64_t slot = batch.token_slots[tokens[0]];
    std::int64_t column = 0;
    for (std::int64_t s = 0; s < batch.num_projections; ++s) {
      const std::int64_t row = s * batch.num_slots + slot;
      const std::int64_t a_offset = batch.slots[row * 3], b_offset = batch.slots[row * 3 + 1];
      const std::int64_t rank = batch.slots[row * 3 + 2];
      if (rank < 0 || rank > batch.max_rank) {
        fail(Status::invalid_argument,
             "slots[" + std::to_string(s) + ", " + std::to_string(slot) + "]",
             "a rank from 0 to max_rank " + std::to_string(batch.max_rank), std::to_string(rank));
      }
      const std::int64_t width = uses_b ? args.widths[s] : 0;
      if (rank > 0) {
        if (uses_a) check_block("a", a_offset, rank, args.in, args.a_size, slot, s);
        if (uses_b) check_block("b", b_offset, rank, width, args.b_size, slot, s);
        products.push_back({
            .tokens = tokens,
            .num_tokens = num_tokens,
            .rank = rank,
            .width = width,
            .projection = s,
            .column = column,
            .a = uses_a ? static_cast<const std::byte*>(args.a) + a_offset * a_size : nullptr,
            .b = uses_b ? static_cast<const std::byte*>(args.b) + b_offset * b_size : nullptr,
            .scale = uses_b ? batch.scales[row] : 0.0f,
            .v_begin = v_size,
        });
        v_size += num_tokens * rank;
      }
      column += width;
    }
  }
}

}  // namespace toppings::cpu
