// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/lora_args.h>

namespace toppings {

// lora_forward by the calling thread alone, without OpenMP: the same bits, the same errors.
void lora_forward_serial(const LoraForward& args);

}  // namespace toppings
