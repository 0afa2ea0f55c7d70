// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <immintrin.h>

#include <chrono>

// Waiting for what is about to happen, without the tens of microseconds that a wake-up costs.
namespace toppings {

using SteadyTime = std::chrono::steady_clock::time_point;

inline SteadyTime steady_now() { return std::chrono::steady_clock::now(); }

// now + timeout, where that doesn't overflow; "for ever" is a very long time.
inline SteadyTime steady_deadline(std::chrono::nanoseconds timeout) {
  constexpr std::chrono::nanoseconds kForever = std::chrono::hours(24 * 365);
  return steady_now() + (timeout < kForever ? timeout : kForever);
}

// Long enough for a neighbour's small copy, short enough not to show as load.
constexpr std::chrono::microseconds kSpin{60};

// Does is_done() hold before the deadline? Tried once at least.
template <class F>
bool spin_until(SteadyTime deadline, F is_done) {
  for (;;) {
    for (int i = 0; i < 16; ++i) {
      if (is_done()) return true;
      _mm_pause();
    }
    if (steady_now() >= deadline) return is_done();
  }
}

}  // namespace toppings
