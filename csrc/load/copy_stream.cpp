// SPDX-License-Identifier: Apache-2.0
#include "load/copy_stream.h"

#include <toppings/error.h>

#include <utility>

namespace toppings {

CopyStream::CopyStream(std::shared_ptr<Device> device)
    : device_(std::move(device)), stream_(device_->make_stream()) {}

void CopyStream::enqueue(std::shared_ptr<LoadState> load, int layer, std::byte* dst, int sharers) {
  const std::byte* src = load->image->layer_data(layer);
  const std::int64_t bytes = load->image->layout().layer_bytes(layer);
  // A copy takes from the end of the one before it; where there is none, from a mark of its own.
  std::shared_ptr<Event> begin;
  if (in_flight_.empty()) {
    begin = make_event();
    stream_->record(*begin);
  } else {
    begin = in_flight_.back().end;
  }
  std::shared_ptr<Event> end = make_event();
  in_flight_.push_back({.load = std::move(load),
                        .layer = layer,
                        .bytes = bytes,
                        .sharers = sharers,
                        .begin = begin,
                        .end = end});
  try {
    stream_->copy(dst, src, static_cast<std::size_t>(bytes));
    stream_->record(*end);
  } catch (...) {
    in_flight_.pop_back();
    try {
      stream_->synchronize();  // the copy may have begun, and nobody would wait for it
    } catch (const Error&) {
    }
    throw;
  }
  bytes_in_flight_ += bytes;
}

Copy CopyStream::pop() {
  Copy copy = std::move(in_flight_.front());
  in_flight_.pop_front();
  bytes_in_flight_ -= copy.bytes;
  used_.push_back(copy.begin);
  if (in_flight_.empty()) used_.push_back(copy.end);
  return copy;
}

std::deque<Copy> CopyStream::reset() {
  used_.clear();
  bytes_in_flight_ = 0;
  std::deque<Copy> given_up = std::exchange(in_flight_, {});
  try {
    stream_->synchronize();  // nobody may write to the slots of these copies any more
  } catch (const Error&) {
  }
  try {
    stream_ = device_->make_stream();
  } catch (const Error&) {  // the old one fails the loads to come, one by one
  }
  return given_up;
}

std::shared_ptr<Event> CopyStream::make_event() {
  if (!used_.empty() && used_.front().use_count() == 1) {
    std::shared_ptr<Event> event = std::move(used_.front());
    used_.pop_front();
    return event;
  }
  return device_->make_event();
}

}  // namespace toppings
