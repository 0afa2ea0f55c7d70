// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <toppings/error.h>

#include <string>

namespace toppings::cuda {

// For as long as it lives, the calling thread's CUDA calls go to one GPU, and are allowed while
// another thread captures a graph: nothing here touches the stream that is being captured.
class OnDevice {
 public:
  // Throws device_failed.
  explicit OnDevice(int index);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int previous_ = 0;
  bool is_switched_ = false;
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Throws what `call` came to, if that isn't success: device_failed, or out_of_memory where the
// driver says so. The CUDA runtime's last error is cleared, so that nobody else trips over it.
void check_call(cudaError_t error, const char* call);

// "cudaErrorInvalidValue (invalid argument)"
std::string text_of(cudaError_t error);

}  // namespace toppings::cuda
