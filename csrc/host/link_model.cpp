// SPDX-License-Identifier: Apache-2.0
#include "host/link_model.h"

#include <algorithm>

namespace toppings {

LinkModel::LinkModel(double bytes_per_second, double latency_seconds)
    : bytes_per_second_(bytes_per_second), latency_(latency_seconds) {}

void LinkModel::append(LinkLane& lane, double bytes, double now) {
  advance(now);
  const LinkLane::Transfer transfer{.bytes = bytes, .ready_at = clock_ + latency_};
  if (lane.is_busy) {
    lane.queued.push_back(transfer);
  } else {
    lane.is_busy = true;
    busy_.push_back(&lane);
    start(lane, transfer);
  }
}

void LinkModel::start(LinkLane& lane, const LinkLane::Transfer& transfer) {
  lane.remaining = transfer.bytes;
  lane.active_at = std::max(clock_, transfer.ready_at);
  lane.is_active = false;
}

// Nothing changes before `until`.
void LinkModel::serve(double until) {
  if (active_ > 0) {
    const double share = (until - clock_) * bytes_per_second_ / static_cast<double>(active_);
    for (LinkLane* lane : busy_) {
      if (lane->is_active) lane->remaining = std::max(0.0, lane->remaining - share);
    }
  }
  clock_ = until;
}

void LinkModel::advance(double now) {
  while (!busy_.empty()) {
    const auto change_of = [&](const LinkLane& lane) {
      if (!lane.is_active) return lane.active_at;
      return clock_ + lane.remaining * static_cast<double>(active_) / bytes_per_second_;
    };
    const auto next = std::min_element(busy_.begin(), busy_.end(),
                                       [&](const LinkLane* left, const LinkLane* right) {
                                         return change_of(*left) < change_of(*right);
                                       });
    LinkLane& lane = **next;
    const double change = change_of(lane);
    if (change > now) break;
    serve(change);
    if (!lane.is_active) {
      lane.is_active = true;
      ++active_;
      continue;
    }
    --active_;
    lane.ends.push_back(clock_);
    if (lane.queued.empty()) {
      lane.is_active = lane.is_busy = false;
      busy_.erase(next);
    } else {
      start(lane, lane.queued.front());
      lane.queued.pop_front();
    }
  }
  if (now > clock_) serve(now);
}

double LinkModel::earliest_end(const LinkLane& lane) const {
  if (!lane.is_active) return lane.active_at + lane.remaining / bytes_per_second_;
  double bytes = 0;  // that pass before the last of this one's
  for (const LinkLane* other : busy_) {
    if (other->is_active) bytes += std::min(other->remaining, lane.remaining);
  }
  return clock_ + bytes / bytes_per_second_;
}

void LinkModel::remove(LinkLane& lane) {
  if (lane.is_active) --active_;
  std::erase(busy_, &lane);
  lane = {};
}

}  // namespace toppings
