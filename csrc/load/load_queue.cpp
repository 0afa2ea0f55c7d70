// SPDX-License-Identifier: Apache-2.0
#include "load/load_queue.h"

#include <algorithm>
#include <utility>

namespace toppings {
namespace {

int class_of(bool is_demanded, const LoadState& load) {
  return (is_demanded ? 256 : 0) + static_cast<int>(load.priority);
}

int class_of_next(const LoadState& load) { return class_of(load.is_next_demanded(), load); }

// The layers that an earlier load of the same slot has in flight would be written twice.
bool is_ready(const LoadState& load) {
  return load.has_waiting() && (load.predecessor == nullptr || load.predecessor->in_flight == 0);
}

}  // namespace

void LoadQueue::add(std::shared_ptr<LoadState> load) {
  if (!loads_.empty()) {
    load->served = (*std::ranges::min_element(loads_, {}, [](const auto& other) {
                     return other->served;
                   }))->served;
  }
  loads_.push_back(std::move(load));
}

void LoadQueue::remove(const LoadState& load) {
  std::erase_if(loads_, [&](const auto& other) { return other.get() == &load; });
}

std::shared_ptr<LoadState> LoadQueue::next(int stream) const {
  std::shared_ptr<LoadState> best;
  int best_class = -1;
  for (const std::shared_ptr<LoadState>& load : loads_) {
    if (!is_ready(*load) || class_of_next(*load) < best_class) continue;
    if (class_of_next(*load) > best_class) {  // a lower class gets nothing meanwhile
      best_class = class_of_next(*load);
      best = nullptr;
    }
    const bool may_use = load->in_flight == 0 || load->stream == stream;
    if (may_use && (best == nullptr || load->served < best->served)) best = load;
  }
  // Behind a higher class in its stream, but not beside it: that would take half the link from it.
  const bool is_beside = std::ranges::any_of(loads_, [&](const auto& load) {
    return load->in_flight > 0 && load->stream != stream &&
           class_of(load->is_demanded(), *load) > best_class;
  });
  return is_beside ? nullptr : best;
}

int LoadQueue::sharers(const LoadState& load) const {
  const int own_class = class_of_next(load);
  int count = 1;
  for (const std::shared_ptr<LoadState>& other : loads_) {
    count += other.get() != &load && is_ready(*other) && class_of_next(*other) >= own_class;
  }
  return count;
}

}  // namespace toppings
