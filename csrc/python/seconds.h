// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/error.h>

#include <chrono>
#include <cmath>
#include <string>

namespace toppings::python {

// Of a time that Python gave: the longest there is beyond 292 years, 0 below 0.
inline std::chrono::nanoseconds nanoseconds_of(double seconds) {
  if (std::isnan(seconds)) {
    throw Error(Status::invalid_argument, "seconds: expected a number, got nan");
  }
  const std::chrono::duration<double, std::nano> time = std::chrono::duration<double>(seconds);
  if (time.count() >= 0x1p63) return std::chrono::nanoseconds::max();
  if (time.count() <= 0) return std::chrono::nanoseconds::zero();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time);
}

}  // namespace toppings::python
