// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>

#include "load/load_state.h"

namespace toppings {

// A layer on its way.
struct Copy {
  std::shared_ptr<LoadState> load;
  int layer;
  std::int64_t bytes;
  int sharers;  // streams that had copies in flight when it was enqueued, its own included
  std::shared_ptr<Event> begin, end;
};

// A stream, and the copies that were enqueued in it and haven't been found done yet. Not
// thread-safe, but for events, which anyone may wait for.
class CopyStream {
 public:
  explicit CopyStream(std::shared_ptr<Device> device);

  const std::deque<Copy>& in_flight() const noexcept { return in_flight_; }
  std::int64_t bytes_in_flight() const noexcept { return bytes_in_flight_; }

  // Enqueues a layer's copy. Nothing has changed when it throws.
  void enqueue(std::shared_ptr<LoadState> load, int layer, std::byte* dst, int sharers);

  // Is the oldest copy done? Throws what made it fail.
  bool is_front_done() const { return in_flight_.front().end->is_done(); }

  Copy pop();

  // After a failure: what was enqueued is given up, and a new stream takes over.
  std::deque<Copy> reset();

 private:
  std::shared_ptr<Event> make_event();

  std::shared_ptr<Device> device_;
  std::unique_ptr<Stream> stream_;
  std::deque<Copy> in_flight_;
  std::int64_t bytes_in_flight_ = 0;
  std::deque<std::shared_ptr<Event>> used_;  // events to be used again, once nobody waits for them
};

}  // namespace toppings
