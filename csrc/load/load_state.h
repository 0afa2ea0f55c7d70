// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>
#include <toppings/image.h>
#include <toppings/load.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <utility>
#include <vector>

namespace toppings {

class LoaderCore;

// One load. Plain data of the loader's, guarded by its mutex but for what is const or atomic.
class LoadState : public std::enable_shared_from_this<LoadState> {
 public:
  using Clock = std::chrono::steady_clock;

  enum class LayerState : std::uint8_t { waiting, copying, arrived };

  struct Layer {
    LayerState state = LayerState::waiting;
    std::shared_ptr<Event> event;  // of its copy, once that is enqueued
    LayerTimes times{};
  };

  LoadState(std::shared_ptr<LoaderCore> core_, int slot_, std::shared_ptr<const Image> image_,
            std::vector<int> order_)
      : core(std::move(core_)),
        slot(slot_),
        image(std::move(image_)),
        order(std::move(order_)),
        layers(order.size()),
        arrived(order.size()) {}

  Layer& layer(int index) { return layers[static_cast<std::size_t>(index)]; }

  // Only ever turns true, so a reader that sees it needs no lock.
  bool has_arrived(int index) const {
    return arrived[static_cast<std::size_t>(index)].load(std::memory_order_acquire);
  }

  // Does somebody wait for the next layer to be enqueued; or for that or one of those in flight?
  bool is_next_demanded() const { return demanded > next; }
  bool is_demanded() const { return demanded + static_cast<std::size_t>(in_flight) > next; }
  std::size_t position(int index) const {
    return static_cast<std::size_t>(std::ranges::find(order, index) - order.begin());
  }

  void demand(int index) { demanded = std::max(demanded, position(index) + 1); }

  void skip_ahead() {
    while (next < order.size() && layer(order[next]).state != LayerState::waiting) ++next;
  }

  bool has_waiting() const { return status == LoadStatus::loading && next < order.size(); }

  const std::shared_ptr<LoaderCore> core;
  const int slot;
  const std::shared_ptr<const Image> image;
  const std::vector<int> order;
  const Clock::time_point start = Clock::now();

  LoadStatus status = LoadStatus::loading;
  bool ended = false;        // no copy is in flight any more, and the loader's pin is gone
  std::exception_ptr error;  // when it failed
  LoadPriority priority = LoadPriority::prefetch;
  int wanted = 0;            // tickets that haven't been cancelled
  std::size_t next = 0;      // order[next ...] is still to be enqueued
  std::size_t demanded = 0;  // somebody waits for order[... demanded - 1]
  int in_flight = 0;         // copies
  int stream = -1;           // where they are
  std::int64_t served = 0;  // bytes enqueued, counted from those of the least served when it joined
  std::shared_ptr<LoadState> predecessor;  // of the same slot; its copies end first
  std::vector<Layer> layers;
  std::vector<std::atomic<bool>> arrived;
  std::atomic<int> num_arrived = 0;
};

}  // namespace toppings
