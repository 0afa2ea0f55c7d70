// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/lora_args.h>

#include <cstddef>
#include <cstdint>

#include "cuda/config.h"
#include "cuda/params.h"

// From an operator's arguments to those of its launches; plain C++, so that the simulator's tests
// launch exactly what a GPU gets.
namespace toppings::cuda {

// One of the three operators on at most kMaxProjections projections.
struct Call {
  LoraForward args;
  bool shrinks = true, expands = true;
  float* v = nullptr;       // where only one of them is done: [S, T, v_rank]
  std::int64_t v_rank = 0;  // max_rank if v is the result
};

Call call_of(const LoraForward& forward);
Call call_of(const LoraShrink& shrink);
Call call_of(const LoraExpand& expand);

// The same for projections [first, first + count).
Call part_of(const Call& call, std::int64_t first, std::int64_t count);

// The dtype whose kernel does it: 16 bits if all that is multiplied has that dtype, else fp32.
DType math_of(const Call& call);

Problem problem_of(const Call& call);

// What the windows of a call have in common. The workspace holds config.workspace bytes. Without a
// plan, small batches need none; for others one is to be made at config.plan_begin.
LoraParams params_of(const Call& call, const Config& config, std::byte* workspace);
bool needs_plan(const Call& call);

// The parts of a call, each of which gets launches of its own; none if there is nothing to do.
template <class F>
void for_each_part(const Call& call, F f) {
  const LoraBatch& batch = call.args.batch;
  if (batch.tokens == 0 || batch.num_slots == 0 || batch.max_rank == 0) return;
  const std::int64_t count = batch.num_projections;
  for (std::int64_t first = 0; first < count; first += kMaxProjections) {
    const std::int64_t left = count - first;
    f(part_of(call, first, left < kMaxProjections ? left : kMaxProjections));
  }
}

// The launches of a part, in their order: make_plan(where, params) if one is needed, and then
// launch(params) for every window of tokens.
template <class MakePlan, class Launch>
void for_each_launch(const Call& part, const Config& config, std::byte* workspace,
                     MakePlan make_plan, Launch launch) {
  LoraParams params = params_of(part, config, workspace);
  if (needs_plan(part)) {
    make_plan(reinterpret_cast<std::int32_t*>(workspace + config.plan_begin), params);
  }
  const std::int64_t tokens = params.tokens;
  for (std::int64_t begin = 0; begin < tokens; begin += config.window) {
    const std::int64_t end = begin + config.window;
    params.window_begin = static_cast<std::int32_t>(begin);
    params.window_end = static_cast<std::int32_t>(end < tokens ? end : tokens);
    launch(params);
  }
}

}  // namespace toppings::cuda
