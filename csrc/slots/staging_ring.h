// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>

#include <cstddef>
#include <deque>
#include <memory>

namespace toppings {

// Host memory that small copies to a device come from. What was enqueued may run much later, so its
// source stays as it is until then, and the next copy takes the memory behind it. Not thread-safe.
class StagingRing {
 public:
  StagingRing(std::shared_ptr<Device> device, std::size_t bytes);
  ~StagingRing();
  StagingRing(const StagingRing&) = delete;
  StagingRing& operator=(const StagingRing&) = delete;

  // Copies `bytes` (at most a quarter of the ring) in stream order, of which the source may change
  // at once. The host waits only where the ring is full of copies that haven't run.
  void copy(Stream& stream, void* device_dst, const void* src, std::size_t bytes);

 private:
  struct Piece {
    std::size_t begin, end;
    std::unique_ptr<Event> event;  // of its copy
  };

  std::size_t reserve(std::size_t bytes);

  std::shared_ptr<Device> device_;
  std::size_t bytes_;
  std::byte* data_;
  std::deque<Piece> in_flight_;  // oldest first
  std::size_t head_ = 0;         // where the next piece begins
};

}  // namespace toppings
