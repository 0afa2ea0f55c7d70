// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string>

// The calls of the CUDA runtime that csrc/cuda/device*.cpp makes, on threads and main memory. Link
// it in place of the runtime: two GPUs whose memory the CPU can read. What a program must not do
// (free what was never allocated, copy from memory that isn't page-locked, use a stream or an event
// after its end, call with another device current) fails the running test.
namespace toppings::cuda_fake {

constexpr int kDevices = 2;
constexpr std::size_t kDeviceBytes = std::size_t{1} << 30;  // of each

// The call of that name fails after `after` more that succeed, once. For a failure while the work
// runs, which makes every later call on that device's streams and events fail, name "copy".
void fail_call(const std::string& name, cudaError_t error, int after = 0);

// No failures ahead, and none left on the devices.
void heal();

// What there is now.
struct Live {
  std::size_t allocations, locks, streams, events;
  bool operator==(const Live&) const = default;
};
Live live();

// Calls of that name so far.
int calls(const std::string& name);

}  // namespace toppings::cuda_fake
