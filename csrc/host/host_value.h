// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// 32-bit values in memory that two sides share, as Stream's of the same names.
namespace toppings {

void write_host_value(std::uint32_t* address, std::uint32_t value);
void wait_host_value(const std::uint32_t* address, std::uint32_t value);

}  // namespace toppings
