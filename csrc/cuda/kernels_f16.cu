// SPDX-License-Identifier: Apache-2.0
#include "cuda/forward.cuh"
#include "cuda/kernels.h"

namespace toppings::cuda {

Kernels f16_kernels() {
  return {.narrow = lora_kernel<f16, NarrowTile>, .wide = lora_kernel<f16, WideTile>};
}

}  // namespace toppings::cuda
