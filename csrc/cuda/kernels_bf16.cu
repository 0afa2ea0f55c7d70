// SPDX-License-Identifier: Apache-2.0
#include "cuda/forward.cuh"
#include "cuda/kernels.h"

namespace toppings::cuda {

Kernels bf16_kernels() {
  return {.narrow = lora_kernel<bf16, NarrowTile>, .wide = lora_kernel<bf16, WideTile>};
}

}  // namespace toppings::cuda
