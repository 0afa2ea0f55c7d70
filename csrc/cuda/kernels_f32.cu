// SPDX-License-Identifier: Apache-2.0
#include "cuda/forward.cuh"
#include "cuda/kernels.h"

namespace toppings::cuda {

Kernels f32_kernels() {
  return {.narrow = lora_kernel<float, NarrowTile>, .wide = lora_kernel<float, WideTile>};
}

}  // namespace toppings::cuda
