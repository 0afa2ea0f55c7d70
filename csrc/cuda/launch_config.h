// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace toppings::cuda {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// How a kernel is launched: by launch() on a GPU, by sim::launch() on a CPU.
struct LaunchConfig {
  Dim3 grid = {};
  Dim3 block = {};               // x is a multiple of 32
  std::size_t shared_bytes = 0;  // what dynamic_shared() holds
  void* stream = nullptr;        // cudaStream_t
  bool cooperative = false;      // all blocks are resident, or the launch fails
  // It may start before the previous kernel of the stream has ended, and calls
  // wait_for_previous_kernel() before it reads what that one wrote. Needs sm_90.
  bool overlaps_previous = false;
};

}  // namespace toppings::cuda
