// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>
#include <toppings/export.h>
#include <toppings/load.h>
#include <toppings/slot_table.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

namespace toppings {

class LoaderCore;
class LoadState;  // one load, shared by its tickets and the loader

// One caller's hold on a load. Dropping a ticket doesn't stop the load. Thread-safe.
class TOPPINGS_EXPORT Ticket {
 public:
  ~Ticket();
  Ticket(const Ticket&) = delete;
  Ticket& operator=(const Ticket&) = delete;

  int slot() const noexcept;
  const std::shared_ptr<Device>& device() const noexcept;
  LoadStatus status() const;  // cancelled: this ticket, or the loader is gone

  int num_arrived() const noexcept;  // layers, also those that hold nothing
  bool has_arrived(int layer) const;

  // Seconds until the layer arrives, from the bytes queued before it and the link's measured rate;
  // 0 once it is there. An estimate.
  double seconds_until(int layer) const;

  // What is enqueued in `stream` from now on finds the layer loaded, and published in the
  // operators' tables. On a GPU the host doesn't wait. On the host's own stream the calling thread
  // does. The layer, and those before it in the load's order, are copied next, before other loads.
  // Throws cancelled, or what made the load fail.
  void wait(int layer, Stream& stream);

  // Waits on the host; false when the time ran out. Throws as wait does.
  bool wait_for(int layer, std::chrono::nanoseconds timeout);
  bool wait_for_all(std::chrono::nanoseconds timeout);

  // Gives up. When no other ticket wants the load, no further copy is begun and waiters are woken;
  // layers that have arrived stay. Does nothing once the load has ended.
  void cancel();

  // Never lowers.
  void raise(LoadPriority priority);

  // [num_layers], for the layers that have arrived.
  std::vector<LayerTimes> times() const;

 private:
  friend class Loader;
  explicit Ticket(std::shared_ptr<LoadState> load);
  void check_layer(int layer) const;
  void check_wait(int layer) const;

  const std::shared_ptr<LoadState> load_;
  std::atomic<bool> is_cancelled_ = false;
};

// Copies images of acquired slots into an arena: one copy per layer, in the order asked for, and
// publishes every layer as it arrives. Loads share the link by bytes; layers that somebody waits
// for go first, then higher priorities. Thread-safe.
class TOPPINGS_EXPORT Loader {
 public:
  using Stats = LoaderStats;

  // Throws invalid_argument: no streams, a negative window, a core that doesn't exist.
  explicit Loader(std::shared_ptr<SlotTable> table, LoaderOptions options = {});
  // Cancels what is under way and waits for the copies that have begun.
  ~Loader();
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  // Begins to load a pinned slot. order: every layer once; empty: 0, 1, 2, ... Layers that are
  // published already are not copied. The loader holds a pin of its own until the last copy has
  // ended, so the caller may release the slot at any time. A slot that is being loaded already gets
  // another ticket of the same load, which keeps its order and takes the higher priority. Throws
  // invalid_argument for a slot that isn't pinned or an order that isn't a permutation.
  Ticket load(int slot, LoadPriority priority = LoadPriority::normal, std::vector<int> order = {});

  const std::shared_ptr<SlotTable>& table() const noexcept;
  Stats stats() const;

 private:
  std::shared_ptr<LoaderCore> core_;
};

}  // namespace toppings
