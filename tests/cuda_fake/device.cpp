// SPDX-License-Identifier: Apache-2.0
// Devices, errors, memory.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "memory.h"
#include "state.h"

using namespace toppings::cuda_fake;

namespace {

thread_local int current_device = 0;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

namespace toppings::cuda_fake {

int current() { return current_device; }

bool is_inside(const std::map<std::uintptr_t, Range>& ranges, const void* data, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  auto after = ranges.upper_bound(begin);
  if (after == ranges.begin()) return false;
  const auto& [start, range] = *--after;
  return begin - start <= range.bytes && bytes <= range.bytes - (begin - start);
}

void check_relaxed(const char* call) {
  if (capture_mode != cudaStreamCaptureModeRelaxed) {
    mistake(std::string(call) + " breaks another thread's capture");
  }
}

}  // namespace toppings::cuda_fake

cudaError_t cudaGetDeviceCount(int* count) {
  if (const auto error = enter("cudaGetDeviceCount")) return remember(error);
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  if (const auto error = enter("cudaGetDevice")) return remember(error);
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (const auto error = enter("cudaSetDevice")) return remember(error);
  if (device < 0 || device >= kDevices) return remember(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
  if (const auto error = enter("cudaDeviceGetPCIBusId")) return remember(error);
  std::snprintf(id, static_cast<std::size_t>(length), "FFFF:%02X:1F.7", device);  // none has it
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorIllegalAddress:
      return "cudaErrorIllegalAddress";
    default:
      return "cudaErrorOther";
  }
}

const char* cudaGetErrorString(cudaError_t) { return "as told"; }

cudaError_t cudaMalloc(void** data, std::size_t bytes) {
  if (const auto error = enter("cudaMalloc")) return remember(error);
  check_relaxed("cudaMalloc");
  const std::lock_guard lock(state().mutex);
  std::size_t used = 0;
  for (const auto& [begin, range] : state().allocations) {
    if (range.device == current_device) used += range.bytes;
  }
  if (bytes > kDeviceBytes - used) return remember(cudaErrorMemoryAllocation);
  *data = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*data, 0xA5, bytes);
  state().allocations[reinterpret_cast<std::uintptr_t>(*data)] = {bytes, current_device};
  return cudaSuccess;
}

cudaError_t cudaFree(void* data) {
  if (const auto error = enter("cudaFree")) return remember(error);
  check_relaxed("cudaFree");
  const std::lock_guard lock(state().mutex);
  if (state().allocations.erase(reinterpret_cast<std::uintptr_t>(data)) == 0) {
    return remember(mistake("cudaFree of what isn't allocated"));
  }
  std::free(data);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* data, std::size_t bytes, unsigned int flags) {
  if (const auto error = enter("cudaHostRegister")) return remember(error);
  if (flags != (cudaHostRegisterPortable | cudaHostRegisterMapped)) {
    mistake("host memory that is not portable and mapped");
  }
  const std::lock_guard lock(state().mutex);
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  const auto after = state().locks.lower_bound(begin);
  if (is_inside(state().locks, data, 1) ||
      (after != state().locks.end() && after->first < begin + bytes)) {
    return remember(cudaErrorHostMemoryAlreadyRegistered);
  }
  state().locks[begin] = {bytes, current_device};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* data) {
  if (const auto error = enter("cudaHostUnregister")) return remember(error);
  const std::lock_guard lock(state().mutex);
  if (state().locks.erase(reinterpret_cast<std::uintptr_t>(data)) == 0) {
    return remember(mistake("cudaHostUnregister of what isn't page-locked"));
  }
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** pointer, void* data, unsigned int) {
  if (const auto error = enter("cudaHostGetDevicePointer")) return remember(error);
  const std::lock_guard lock(state().mutex);
  if (!is_inside(state().locks, data, 1)) return remember(cudaErrorInvalidValue);
  *pointer = reinterpret_cast<void*>(reinterpret_cast<std::uintptr_t>(data) + kMappedAt);
  return cudaSuccess;
}
