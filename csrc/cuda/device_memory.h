// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

namespace toppings::cuda {

// The NUMA node that the GPU hangs on; -1 where the system doesn't say. On the current device.
int numa_node_of(int index);

// Host memory that the GPU copies from at full speed and can map: zero-filled, on node `numa_node`
// if there is room, in large pages if there are, page-locked. Throws out_of_memory or
// device_failed. On the current device.
void* allocate_pinned(std::size_t bytes, int numa_node);

// Once it is no longer page-locked.
void unmap(void* data, std::size_t bytes) noexcept;

}  // namespace toppings::cuda
