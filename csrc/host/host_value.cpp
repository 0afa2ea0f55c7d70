// SPDX-License-Identifier: Apache-2.0
#include "host/host_value.h"

#include <atomic>
#include <chrono>

#include "host/futex.h"
#include "host/spin.h"

namespace toppings {
namespace {

// A writer that isn't this library wakes nobody.
constexpr std::chrono::milliseconds kLongestSleep{1};

}  // namespace

void write_host_value(std::uint32_t* address, std::uint32_t value) {
  std::atomic_ref(*address).store(value, std::memory_order_release);
  futex_wake(address);
}

void wait_host_value(const std::uint32_t* address, std::uint32_t value) {
  const std::atomic_ref word(*const_cast<std::uint32_t*>(address));  // only read
  const auto is_reached = [&](std::uint32_t now) {
    return static_cast<std::int32_t>(now - value) >= 0;
  };
  const auto is_done = [&] { return is_reached(word.load(std::memory_order_acquire)); };
  if (spin_until(steady_now() + kSpin, is_done)) return;
  for (;;) {
    const std::uint32_t now = word.load(std::memory_order_acquire);
    if (is_reached(now)) return;
    futex_wait(address, now, kLongestSleep);
  }
}

}  // namespace toppings
