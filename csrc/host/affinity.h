// SPDX-License-Identifier: Apache-2.0
#pragma once

// Threads pinned to a core. Core -1 stands for "not pinned" and is always allowed.
namespace toppings {

// Throws invalid_argument for a core that this process can't run on.
void check_cpu(const char* what, int cpu);

// Throws device_failed when the system refuses.
void pin_this_thread(int cpu);

}  // namespace toppings
