// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/load.h>
#include <toppings/slot_table.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "load/copy_stream.h"
#include "load/load_queue.h"
#include "load/load_state.h"

namespace toppings {

// Loads from their beginning to their end: which copies are in flight, what has arrived, how fast
// the link is. Nothing in here waits or locks; the loader does both. Not thread-safe.
class Transfers {
 public:
  Transfers(std::shared_ptr<SlotTable> table, const LoaderOptions& options);

  // The load of a slot, under way or with its last copies in flight; null when there is none.
  std::shared_ptr<LoadState> find(int slot) const;

  // Pins the slot until the load has ended. Nothing has changed when it throws.
  void begin(const std::shared_ptr<LoadState>& load);

  // No further copy is begun.
  void cancel(const std::shared_ptr<LoadState>& load);
  void cancel_all();

  // Enqueues what the streams have room for, in the queue's order.
  void feed();

  // Enqueues everything up to a layer, room or not. A failure ends the load, here and everywhere.
  void force(const std::shared_ptr<LoadState>& load, int layer);

  // Takes note of the copies that have ended.
  void harvest();

  bool is_idle() const;  // nothing is in flight

  // Until the next copy is likely to end.
  std::chrono::nanoseconds nap() const;

  // Until the layer arrives; infinity while the link's rate isn't known.
  double seconds_until(const LoadState& load, int layer) const;

  LoaderStats stats() const;

  // Has a copy been enqueued or ended, or a load ended, since the last call?
  bool take_progress() { return std::exchange(has_progress_, false); }

 private:
  using Clock = LoadState::Clock;

  bool has_room() const;
  int emptiest_stream() const;
  int busy_streams(const CopyStream& own) const;
  void enqueue(const std::shared_ptr<LoadState>& load, int stream);
  void harvest(CopyStream& stream);
  void complete(const Copy& copy, double seconds);
  void measure(const Copy& copy, double seconds);
  void arrive(LoadState& load, int layer);
  void fail_load(const std::shared_ptr<LoadState>& load, const std::exception_ptr& error);
  void finish_if_ended(const std::shared_ptr<LoadState>& load);

  const std::shared_ptr<SlotTable> table_;
  const double window_seconds_;
  LoadQueue queue_;
  std::vector<CopyStream> streams_;
  std::unordered_map<int, std::shared_ptr<LoadState>> by_slot_;  // the latest of each
  LoaderStats stats_{};
  Clock::time_point last_arrival_{};
  bool has_progress_ = false;
};

}  // namespace toppings
