// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/assist/task.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace toppings::assist {

// A task may come from another process: nothing in it is believed. Throws invalid_argument unless
// its sizes are possible, x and deltas fit into so many bytes, and its weights lie in its region.
void check_task(const Task& task, std::int64_t x_bytes, std::int64_t deltas_bytes);
void check_weights(const Task& task, std::span<const Region> regions);

// Rows [first, first + count) of the deltas of a checked task, by the calling thread alone.
void compute(const Task& task, std::span<const Region> regions, const std::byte* x,
             std::byte* deltas, std::int64_t first, std::int64_t count);

}  // namespace toppings::assist
