// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <string_view>

#include "sim.h"

namespace toppings::sim {

// "decode.cuh:120"
std::string place(Site site);
std::string text(const cuda::simulator::Index& index);
std::string_view name_of(cuda::simulator::Access access);
std::string_view name_of(cuda::simulator::Collective kind);

struct Block;

// What every thread of the block is doing, one phrase per group: "threads 0-31 wait in sync_block
// (decode.cuh:120), threads 32-63 have exited".
std::string states(const Block& block);

}  // namespace toppings::sim
