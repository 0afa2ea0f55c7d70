// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>

#include "state.h"

namespace toppings::cuda_fake {

// Where a GPU sees mapped host memory: not where the host does.
constexpr std::uintptr_t kMappedAt = std::uintptr_t{1} << 60;

int current();  // device of the calling thread

// Under the lock.
bool is_inside(const std::map<std::uintptr_t, Range>& ranges, const void* data, std::size_t bytes);

// The call isn't allowed while some thread captures a graph, unless the caller has relaxed that.
void check_relaxed(const char* call);

}  // namespace toppings::cuda_fake
