// SPDX-License-Identifier: Apache-2.0
#include "cuda/device_call.h"

#include "check.h"

namespace toppings::cuda {

OnDevice::OnDevice(int index) {
  check_call(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ != index) {
    check_call(cudaSetDevice(index), "cudaSetDevice");
    is_switched_ = true;
  }
  cudaThreadExchangeStreamCaptureMode(&mode_);
}

OnDevice::~OnDevice() {
  cudaThreadExchangeStreamCaptureMode(&mode_);
  if (is_switched_) cudaSetDevice(previous_);
}

std::string text_of(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

void check_call(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  fail(error == cudaErrorMemoryAllocation ? Status::out_of_memory : Status::device_failed, call,
       "success", text_of(error));
}

}  // namespace toppings::cuda
