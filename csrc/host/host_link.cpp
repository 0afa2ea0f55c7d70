// SPDX-License-Identifier: Apache-2.0
#include "host/host_link.h"

#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace toppings {
namespace {

// Wakes tens of microseconds before the time and spins for the rest. The kernel groups wake-ups
// within a thread's timer slack (50 us unless told otherwise), which would use up all of that.
void wait_until(SteadyTime time) {
  const SteadyTime wake = time - kSpin;
  if (wake > steady_now()) {
    const int slack = prctl(PR_GET_TIMERSLACK, 0UL, 0UL, 0UL, 0UL);
    prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
    const std::int64_t nanoseconds =
        std::chrono::duration_cast<std::chrono::nanoseconds>(wake.time_since_epoch()).count();
    const timespec until{.tv_sec = nanoseconds / 1'000'000'000,
                         .tv_nsec = nanoseconds % 1'000'000'000};
    clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr);
    if (slack > 0) prctl(PR_SET_TIMERSLACK, static_cast<unsigned long>(slack), 0UL, 0UL, 0UL);
  }
  spin_until(time, [] { return false; });
}

}  // namespace

SharedLink::SharedLink(const HostLink& link)
    : model_(link.bytes_per_second, link.latency_seconds) {}

double SharedLink::seconds(SteadyTime time) const {
  return std::chrono::duration<double>(time - origin_).count();
}

// Rounded up: never before the model's time.
SteadyTime SharedLink::time(double seconds) const {
  // Beyond what nanoseconds can count (a link that slow is as good as cut).
  constexpr double kFar = 1e9;
  return origin_ + std::chrono::nanoseconds(
                       static_cast<std::int64_t>(std::ceil(std::min(seconds, kFar) * 1e9)));
}

void SharedLink::begin(LinkLane& lane, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  model_.append(lane, static_cast<double>(bytes), seconds(steady_now()));
}

SteadyTime SharedLink::finish(LinkLane& lane, void* dst, const void* src, std::size_t bytes) {
  std::memcpy(dst, src, bytes);
  const SteadyTime copied = steady_now();
  return std::max(wait(lane), copied);
}

// What begins later can only delay the end, so sleeping until the earliest end and asking again
// needs no wake-ups from others, and rarely more than a few rounds.
SteadyTime SharedLink::wait(LinkLane& lane) {
  for (;;) {
    SteadyTime earliest;
    {
      const std::lock_guard lock(mutex_);
      model_.advance(seconds(steady_now()));
      if (!lane.ends.empty()) {
        const SteadyTime end = time(lane.ends.front());
        lane.ends.pop_front();
        return end;
      }
      earliest = time(model_.earliest_end(lane));
    }
    wait_until(earliest);
  }
}

void SharedLink::remove(LinkLane& lane) {
  const std::lock_guard lock(mutex_);
  model_.remove(lane);
}

}  // namespace toppings
