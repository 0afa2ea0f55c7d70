// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <optional>

#include "seconds.h"

namespace toppings::python {

// Calls wait(slice) without the GIL until it returns true (then: true) or the time has run out, and
// lets Python's signal handlers run in between. seconds: nothing means for ever.
template <class Wait>
bool wait_interruptibly(std::optional<double> seconds, Wait wait) {
  using Clock = std::chrono::steady_clock;
  using Seconds = std::chrono::duration<double>;
  const Clock::time_point start = Clock::now();
  const Seconds timeout(seconds.value_or(std::numeric_limits<double>::infinity()));
  for (;;) {
    const Seconds left = timeout - (Clock::now() - start);
    const Seconds slice(std::clamp(left.count(), 0.0, 0.05));
    {
      const pybind11::gil_scoped_release unlocked;
      if (wait(nanoseconds_of(slice.count()))) return true;
    }
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
    if (left <= slice) return false;
  }
}

}  // namespace toppings::python
