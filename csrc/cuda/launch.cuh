// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <utility>

#include "cuda/launch_config.h"

namespace toppings::cuda {

// Enqueues the kernel. Shared memory beyond 48 KiB must have been asked for, once for the kernel
// and the device (cudaFuncAttributeMaxDynamicSharedMemorySize).
template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchConfig& config, Args&&... args) {
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (config.cooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (config.overlaps_previous) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(config.grid.x, config.grid.y, config.grid.z);
  launch.blockDim = dim3(config.block.x, config.block.y, config.block.z);
  launch.dynamicSmemBytes = config.shared_bytes;
  launch.stream = static_cast<cudaStream_t>(config.stream);
  launch.attrs = attributes;
  launch.numAttrs = count;
  return cudaLaunchKernelEx(&launch, kernel, static_cast<Parameters>(std::forward<Args>(args))...);
}

}  // namespace toppings::cuda
