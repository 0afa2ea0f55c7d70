// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/params.h"

// The instantiations: one .cu per dtype that is multiplied.
namespace toppings::cuda {

struct Kernels {
  void (*narrow)(LoraParams);
  void (*wide)(LoraParams);
};
Kernels bf16_kernels();
Kernels f16_kernels();
Kernels f32_kernels();  // and all mixtures of dtypes

}  // namespace toppings::cuda
