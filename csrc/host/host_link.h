// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>

#include <cstddef>
#include <mutex>

#include "host/link_model.h"
#include "host/spin.h"

namespace toppings {

// A link model that runs in real time. Thread-safe, but a lane has one thread that finishes its
// copies.
class SharedLink {
 public:
  explicit SharedLink(const HostLink& link);

  // Puts a copy on the link, after those already in its lane, from now on. The link is used whether
  // or not the lane's thread gets to run in time.
  void begin(LinkLane& lane, std::size_t bytes);

  // Copies, and waits until the lane's oldest copy, the same one, is through. When that was: on the
  // link, or later where the memcpy took longer.
  SteadyTime finish(LinkLane& lane, void* dst, const void* src, std::size_t bytes);

  void remove(LinkLane& lane);

 private:
  SteadyTime wait(LinkLane& lane);
  double seconds(SteadyTime time) const;
  SteadyTime time(double seconds) const;

  const SteadyTime origin_ = steady_now();
  std::mutex mutex_;
  LinkModel model_;
};

}  // namespace toppings
