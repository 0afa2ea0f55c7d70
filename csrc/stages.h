// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/lora_args.h>

// One stage of lora_forward alone, as a LoraForward that lacks what the other stage needs.
namespace toppings {

inline LoraForward as_forward(const LoraShrink& shrink) {
  return {.batch = shrink.batch,
          .dtype = shrink.dtype,
          .a_dtype = shrink.a_dtype,
          .b_dtype = shrink.a_dtype,
          .in = shrink.in,
          .widths = {},
          .x = shrink.x,
          .x_stride = shrink.x_stride,
          .y = nullptr,
          .y_stride = 0,
          .a = shrink.a,
          .a_size = shrink.a_size,
          .b = nullptr,
          .b_size = 0};
}

inline LoraForward as_forward(const LoraExpand& expand) {
  return {.batch = expand.batch,
          .dtype = expand.dtype,
          .a_dtype = expand.b_dtype,
          .b_dtype = expand.b_dtype,
          .in = 1,
          .widths = expand.widths,
          .x = nullptr,
          .x_stride = 0,
          .y = expand.y,
          .y_stride = expand.y_stride,
          .a = nullptr,
          .a_size = 0,
          .b = expand.b,
          .b_size = expand.b_size};
}

}  // namespace toppings
