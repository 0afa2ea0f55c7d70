// SPDX-License-Identifier: Apache-2.0
#include "slots/staging_ring.h"

#include <toppings/error.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

namespace toppings {

StagingRing::StagingRing(std::shared_ptr<Device> device, std::size_t bytes)
    : device_(std::move(device)),
      bytes_(bytes),
      data_(static_cast<std::byte*>(device_->allocate_host(bytes))) {}

StagingRing::~StagingRing() {
  for (const Piece& piece : in_flight_) {
    try {
      piece.event->wait_for(std::chrono::nanoseconds::max());
    } catch (const Error&) {  // a device that has failed reads no more
    }
  }
  device_->deallocate_host(data_, bytes_);
}

void StagingRing::copy(Stream& stream, void* device_dst, const void* src, std::size_t bytes) {
  if (bytes == 0) return;
  const std::size_t begin = reserve(bytes);
  std::unique_ptr<Event> event = device_->make_event();
  std::memcpy(data_ + begin, src, bytes);
  try {
    stream.copy(device_dst, data_ + begin, bytes);
    stream.record(*event);
  } catch (...) {
    try {
      stream.synchronize();  // the copy may have been enqueued, and nothing would guard its source
    } catch (const Error&) {
    }
    throw;
  }
  in_flight_.push_back({.begin = begin, .end = begin + bytes, .event = std::move(event)});
  head_ = begin + bytes;
}

// A piece of memory that no copy in flight reads.
std::size_t StagingRing::reserve(std::size_t bytes) {
  const std::size_t begin = head_ + bytes <= bytes_ ? head_ : 0;
  // Not only the oldest: where a piece didn't fit before the end, a later one may come first.
  const auto overlaps = [&](const Piece& piece) {
    return piece.begin < begin + bytes && begin < piece.end;
  };
  while (!in_flight_.empty()) {
    const bool is_needed = std::ranges::any_of(in_flight_, overlaps);
    try {
      const Event& oldest = *in_flight_.front().event;
      if (!oldest.wait_for(is_needed ? std::chrono::nanoseconds::max()
                                     : std::chrono::nanoseconds::zero()))
        break;
    } catch (const Error&) {  // its stream has failed, and reads no more
    }
    in_flight_.pop_front();
  }
  return begin;
}

}  // namespace toppings
