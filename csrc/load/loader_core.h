// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/load.h>
#include <toppings/slot_table.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "load/load_state.h"
#include "load/transfers.h"

namespace toppings {

// What a loader and its tickets share: the transfers under one lock, and those who wait for them.
// Copies are enqueued by whoever has a reason to: load(), a ticket that waits, or the loader's own
// thread when an earlier copy has ended. That thread also publishes what has arrived, unless a
// waiting ticket does so first.
class LoaderCore : public std::enable_shared_from_this<LoaderCore> {
 public:
  LoaderCore(std::shared_ptr<SlotTable> table, const LoaderOptions& options);

  void start_thread();
  void stop();  // cancels everything, waits for what is in flight

  std::shared_ptr<LoadState> load(int slot, LoadPriority priority, std::vector<int> order);
  void withdraw(LoadState& load, std::atomic<bool>& is_cancelled);  // one ticket's
  void raise(LoadState& load, LoadPriority priority);
  void wait(LoadState& load, int layer, Stream& stream);
  bool wait_for(LoadState& load, int layer, std::chrono::nanoseconds timeout);
  bool wait_for_all(LoadState& load, std::chrono::nanoseconds timeout);
  double seconds_until(const LoadState& load, int layer) const;
  LoadStatus status(const LoadState& load) const;
  std::vector<LayerTimes> times(const LoadState& load) const;

  const std::shared_ptr<SlotTable>& table() const noexcept { return table_; }
  LoaderStats stats() const;

 private:
  using Clock = LoadState::Clock;
  using Lock = std::unique_lock<std::mutex>;

  void advance();  // under the lock
  void run();

  const std::shared_ptr<SlotTable> table_;
  const int cpu_;
  mutable std::mutex mutex_;
  std::condition_variable work_;      // for the thread: something is in flight, or the end
  std::condition_variable progress_;  // for whoever waits for a layer
  Transfers transfers_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace toppings
