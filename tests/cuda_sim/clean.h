// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>

#include "sim.h"

namespace toppings::sim {

// Runs the kernel in every schedule and expects no complaint.
template <class Kernel, class... Args>
void expect_clean(Kernel kernel, const cuda::LaunchConfig& config, const Args&... args) {
  for (const Options& options : all_schedules()) {
    EXPECT_EQ(launch(kernel, config, options, args...).text(), "") << name_of(options);
  }
}

}  // namespace toppings::sim
