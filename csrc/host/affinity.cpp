// SPDX-License-Identifier: Apache-2.0
#include "host/affinity.h"

#include <sched.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>

#include "check.h"

namespace toppings {
namespace {

// 0 or an errno.
int try_pin(int cpu) {
  if (cpu < 0 || cpu >= CPU_SETSIZE) return EINVAL;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<unsigned>(cpu), &set);
  return sched_setaffinity(0, sizeof set, &set) == 0 ? 0 : errno;
}

}  // namespace

void check_cpu(const char* what, int cpu) {
  if (cpu == -1) return;
  // Tried on a thread of its own: the caller's mask says where the caller runs now, which may be
  // less than where its threads may run.
  int error = 0;
  try {
    std::thread([&] { error = try_pin(cpu); }).join();
  } catch (const std::system_error& none) {
    fail(Status::device_failed, "a thread", "one more", none.what());
  }
  if (error != 0) {
    fail(Status::invalid_argument, what, "a core of this machine, or -1", std::to_string(cpu));
  }
}

void pin_this_thread(int cpu) {
  if (cpu == -1) return;
  const int error = try_pin(cpu);
  if (error != 0) {
    fail(Status::device_failed, "pinning a thread", "core " + std::to_string(cpu),
         std::strerror(error));
  }
}

}  // namespace toppings
