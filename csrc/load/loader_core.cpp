// SPDX-License-Identifier: Apache-2.0
#include "load/loader_core.h"

#include <sys/prctl.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <future>
#include <string>
#include <system_error>
#include <utility>

#include "check.h"
#include "host/affinity.h"
#include "host/spin.h"

namespace toppings {
namespace {

// A layer that is expected so soon is polled for.
constexpr std::chrono::microseconds kNear{150};

// While the last copies of a cancelled load of the same slot are awaited.
constexpr std::chrono::microseconds kLook{50};

std::vector<int> checked_order(std::vector<int> order, int num_layers) {
  if (order.empty()) {
    order.resize(static_cast<std::size_t>(num_layers));
    for (int layer = 0; layer < num_layers; ++layer) order[static_cast<std::size_t>(layer)] = layer;
    return order;
  }
  std::vector<bool> seen(static_cast<std::size_t>(num_layers));
  for (const int layer : order) {
    const bool is_new = layer >= 0 && layer < num_layers && !seen[static_cast<std::size_t>(layer)];
    if (!is_new || order.size() != seen.size()) {
      fail(Status::invalid_argument, "order",
           "every layer of " + std::to_string(num_layers) + " once",
           std::to_string(order.size()) + " with " + std::to_string(layer));
    }
    seen[static_cast<std::size_t>(layer)] = true;
  }
  return order;
}

// Polls for what is about to happen: a wake-up takes longer than many a layer.
void wait_nearby(const Event& event, std::chrono::nanoseconds timeout) {
  try {
    const SteadyTime polled = steady_now() + std::min<std::chrono::nanoseconds>(timeout, 3 * kNear);
    if (!spin_until(polled, [&] { return event.is_done(); })) event.wait_for(timeout);
  } catch (const Error&) {  // found again by advance(), which tells every load concerned
  }
}

void throw_if_ended(const LoadState& load) {
  if (load.status == LoadStatus::failed) std::rethrow_exception(load.error);
  if (load.status == LoadStatus::cancelled) {
    fail(Status::cancelled, "load of slot " + std::to_string(load.slot), "one under way",
         "a cancelled one");
  }
}

}  // namespace

LoaderCore::LoaderCore(std::shared_ptr<SlotTable> table, const LoaderOptions& options)
    : table_(std::move(table)), cpu_(options.cpu), transfers_(table_, options) {}

void LoaderCore::start_thread() {
  std::promise<void> pinned;
  try {
    thread_ = std::thread([&pinned, this] {
      try {
        pin_this_thread(cpu_);
      } catch (const Error&) {
        pinned.set_exception(std::current_exception());
        return;
      }
      pinned.set_value();
      run();
    });
  } catch (const std::system_error& error) {
    fail(Status::device_failed, "the loader's thread", "one more", error.what());
  }
  try {
    pinned.get_future().get();
  } catch (const Error&) {
    thread_.join();
    throw;
  }
}

void LoaderCore::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    transfers_.cancel_all();
  }
  work_.notify_all();
  progress_.notify_all();
  thread_.join();
}

std::shared_ptr<LoadState> LoaderCore::load(int slot, LoadPriority priority,
                                            std::vector<int> order) {
  std::shared_ptr<const Image> image = table_->image(slot);
  order = checked_order(std::move(order), image->layout().shape()->num_layers());
  std::shared_ptr<LoadState> load;
  {
    const std::lock_guard lock(mutex_);
    load = transfers_.find(slot);
    if (load == nullptr || load->status != LoadStatus::loading) {
      load =
          std::make_shared<LoadState>(shared_from_this(), slot, std::move(image), std::move(order));
      transfers_.begin(load);
    }
    ++load->wanted;
    load->priority = std::max(load->priority, priority);
    advance();
  }
  work_.notify_one();
  return load;
}

void LoaderCore::withdraw(LoadState& load, std::atomic<bool>& is_cancelled) {
  const std::lock_guard lock(mutex_);
  if (load.status != LoadStatus::loading || is_cancelled.exchange(true)) return;
  --load.wanted;
  if (load.wanted == 0) transfers_.cancel(load.shared_from_this());
  advance();
}

void LoaderCore::raise(LoadState& load, LoadPriority priority) {
  const std::lock_guard lock(mutex_);
  load.priority = std::max(load.priority, priority);
  advance();
}

void LoaderCore::wait(LoadState& load, int layer, Stream& stream) {
  if (table_->arena()->device()->kind() == DeviceKind::host) {
    wait_for(load, layer, std::chrono::nanoseconds::max());
    return;
  }
  Lock lock(mutex_);
  load.demand(layer);
  advance();
  // At most a window's worth of copies, of a load of this slot that was cancelled just now.
  while (load.predecessor != nullptr && load.predecessor->in_flight > 0) {
    progress_.wait_for(lock, kLook);
    advance();
  }
  if (!load.has_arrived(layer)) {
    throw_if_ended(load);
    transfers_.force(load.shared_from_this(), layer);
    throw_if_ended(load);
    work_.notify_one();
    stream.wait(*load.layer(layer).event);
    table_->publish(load.slot, layer);
  }
  table_->upload(stream, layer);
}

bool LoaderCore::wait_for(LoadState& load, int layer, std::chrono::nanoseconds timeout) {
  if (load.has_arrived(layer)) return true;
  const SteadyTime deadline = steady_deadline(timeout);
  Lock lock(mutex_);
  load.demand(layer);
  advance();
  while (!load.has_arrived(layer)) {
    throw_if_ended(load);
    const std::chrono::nanoseconds left = deadline - Clock::now();
    if (left <= std::chrono::nanoseconds::zero()) return false;
    const std::shared_ptr<Event> event = load.layer(layer).event;
    const std::chrono::duration<double> expected(transfers_.seconds_until(load, layer));
    const bool is_far = std::isfinite(expected.count()) && expected > kNear;
    if (event == nullptr || is_far) {
      const std::chrono::duration<double> nap = is_far ? expected - kNear : left;
      progress_.wait_for(lock, std::min<std::chrono::duration<double>>(left, nap));
    } else {
      lock.unlock();
      wait_nearby(*event, left);
      lock.lock();
    }
    advance();
  }
  return true;
}

bool LoaderCore::wait_for_all(LoadState& load, std::chrono::nanoseconds timeout) {
  const Clock::time_point start = Clock::now();
  {
    const std::lock_guard lock(mutex_);
    load.demand(load.order.back());
  }
  // In the order of their arrival, so that each wait but the last ends before the next one begins.
  for (const int layer : load.order) {
    const std::chrono::nanoseconds left = timeout - (Clock::now() - start);
    if (!wait_for(load, layer, std::max(left, std::chrono::nanoseconds::zero()))) return false;
  }
  return true;
}

double LoaderCore::seconds_until(const LoadState& load, int layer) const {
  if (load.has_arrived(layer)) return 0;
  const std::lock_guard lock(mutex_);
  return transfers_.seconds_until(load, layer);
}

LoadStatus LoaderCore::status(const LoadState& load) const {
  const std::lock_guard lock(mutex_);
  return load.status;
}

std::vector<LayerTimes> LoaderCore::times(const LoadState& load) const {
  const std::lock_guard lock(mutex_);
  std::vector<LayerTimes> times;
  for (const LoadState::Layer& layer : load.layers) times.push_back(layer.times);
  return times;
}

LoaderStats LoaderCore::stats() const {
  const std::lock_guard lock(mutex_);
  return transfers_.stats();
}

void LoaderCore::advance() {
  transfers_.harvest();
  transfers_.feed();
  if (transfers_.take_progress()) progress_.notify_all();
}

void LoaderCore::run() {
  prctl(PR_SET_TIMERSLACK, 1'000UL);  // ns; naps of 50 us would take twice as long
  Lock lock(mutex_);
  for (;;) {
    advance();
    if (!transfers_.is_idle()) {
      work_.wait_for(lock, transfers_.nap());
    } else if (stopping_) {
      return;
    } else {
      work_.wait(lock);
    }
  }
}

}  // namespace toppings
