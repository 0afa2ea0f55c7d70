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

// What the windows of a call have in common, and the windows. The workspace holds config.workspace
// bytes. Without a plan, small batches need none; for others one is to be made at
// config.plan_begin.
LoraParams params_of(const Call& call, const Config& config, std::byte* workspace);
bool needs_plan(const Call& call);
template <class F>
void for_each_window(LoraParams params, std::int64_t window, F launch) {
  for (std::int64_t begin = 0; begin < params.tokens; begin += window) {
    params.window_begin = static_cast<std::int32_t>(begin);
    params.window_end =
        static_cast<std::int32_t>(begin + window < params.tokens ? begin + window : params.tokens);
    launch(params);
  }
}

}  // namespace toppings::cuda
