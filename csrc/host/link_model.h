// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <deque>
#include <vector>

// Who gets which share of a link when. Times are seconds on any clock; nothing here waits.
namespace toppings {

// Transfers that follow one another, as those of a stream do.
struct LinkLane {
  struct Transfer {
    double bytes;
    double ready_at;  // when its latency is over
  };

  double remaining = 0;         // bytes of the first one that aren't through
  double active_at = 0;         // when the first one begins to use the link
  bool is_active = false;       // it does
  bool is_busy = false;         // there is a first one
  std::deque<Transfer> queued;  // those behind it
  std::deque<double> ends;      // when those that are through ended, oldest first
};

// Processor sharing: between two changes (a transfer begins to use the link, or ends) every active
// one gets the same share of the whole capacity. A transfer uses the link when its latency is over
// and the one before it in its lane has ended; so latencies hide behind earlier transfers, as they
// do on a real link. Not thread-safe.
class LinkModel {
 public:
  LinkModel(double bytes_per_second, double latency_seconds);

  // The transfer's latency begins now.
  void append(LinkLane& lane, double bytes, double now);

  // Brings the model to `now`, which never decreases.
  void advance(double now);

  // When a busy lane's first transfer ends, if no other begins to use the link. It never ends
  // earlier.
  double earliest_end(const LinkLane& lane) const;

  // Forgets what the lane still holds.
  void remove(LinkLane& lane);

 private:
  void start(LinkLane& lane, const LinkLane::Transfer& transfer);
  void serve(double until);

  double bytes_per_second_;
  double latency_;
  double clock_ = 0;
  std::vector<LinkLane*> busy_;
  std::size_t active_ = 0;  // of them
};

}  // namespace toppings
