// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

// Main memory for layer blocks and images: 64-byte aligned, zero-filled.
namespace toppings {

// Throws out_of_memory, or invalid_argument for 0 bytes.
void* allocate_memory(std::size_t bytes);
void deallocate_memory(void* data, std::size_t bytes) noexcept;

}  // namespace toppings
