// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>
#include <toppings/lora_args.h>

// The operators on CPU memory. For every token t with slot i = token_slots[t] >= 0:
//   y[t, s] += scales[s, i] * (x[t] A_{s,i}^T) B_{s,i}      accumulated in fp32, y rounded once.
// At level avx512_bf16, with x and all weights in bf16, scale * x[t] A^T is rounded to bf16 once,
// and bf16 numbers below 2^-126 (subnormal ones, also in y) count as 0, as the instructions take
// them.
//
// Deterministic: the order of summation depends on (K, r, dtypes, level) alone, so a row's bits
// don't change with the batch, the other adapters, the thread count or the row's position. Any
// number of threads may call at once.
namespace toppings {

// All three throw invalid_argument, before anything is written.
TOPPINGS_EXPORT void lora_forward(const LoraForward& args);
TOPPINGS_EXPORT void lora_shrink(const LoraShrink& args);
TOPPINGS_EXPORT void lora_expand(const LoraExpand& args);

}  // namespace toppings
