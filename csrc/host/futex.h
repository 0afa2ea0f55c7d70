// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>

// Sleeping on a 32-bit word, which may lie in memory shared with other processes.
namespace toppings {

// Returns when the word was woken, no longer holds `expected`, the time ran out, or for no reason.
void futex_wait(const std::uint32_t* word, std::uint32_t expected,
                std::chrono::nanoseconds timeout);

// Wakes all who sleep on the word.
void futex_wake(const std::uint32_t* word);

}  // namespace toppings
