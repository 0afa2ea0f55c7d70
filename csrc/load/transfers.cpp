// SPDX-License-Identifier: Apache-2.0
#include "load/transfers.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace toppings {
namespace {

// How long the loader's thread sleeps while copies are in flight: it naps rather than waits for
// their events, since enough is enqueued ahead that it may be late, and no core is spun on.
constexpr std::chrono::microseconds kShortestNap{50};
constexpr std::chrono::microseconds kLongestNap{1000};

// Weight of the newest copy in the link's measured rate.
constexpr double kNewest = 0.25;

constexpr std::size_t kLeastAhead = 2;  // copies: one under way, and one more

}  // namespace

Transfers::Transfers(std::shared_ptr<SlotTable> table, const LoaderOptions& options)
    : table_(std::move(table)), window_seconds_(options.window_seconds) {
  streams_.reserve(static_cast<std::size_t>(options.num_streams));
  for (int i = 0; i < options.num_streams; ++i) streams_.emplace_back(table_->arena()->device());
}

std::shared_ptr<LoadState> Transfers::find(int slot) const {
  const auto found = by_slot_.find(slot);
  return found == by_slot_.end() ? nullptr : found->second;
}

void Transfers::begin(const std::shared_ptr<LoadState>& load) {
  // Whatever can run out of memory comes before the pin.
  queue_.add(load);
  try {
    const auto [current, is_new] = by_slot_.try_emplace(load->slot);
    try {
      table_->acquire(load->image);
    } catch (...) {
      if (is_new) by_slot_.erase(current);
      throw;
    }
    load->predecessor = std::exchange(current->second, load);
  } catch (...) {
    queue_.remove(*load);
    throw;
  }
  ++stats_.loads;
  for (int layer = 0; layer < static_cast<int>(load->layers.size()); ++layer) {
    load->layer(layer).times.bytes = load->image->layout().layer_bytes(layer);
    // Published in stream order, maybe, and still on its way: complete() tells both loads.
    const bool is_on_its_way =
        load->predecessor != nullptr &&
        load->predecessor->layer(layer).state == LoadState::LayerState::copying;
    if (load->layer(layer).times.bytes == 0 ||
        (table_->is_published(load->slot, layer) && !is_on_its_way)) {
      arrive(*load, layer);
    }
  }
  finish_if_ended(load);
}

void Transfers::cancel(const std::shared_ptr<LoadState>& load) {
  if (load->status != LoadStatus::loading) return;
  load->status = LoadStatus::cancelled;
  ++stats_.cancelled;
  has_progress_ = true;  // for those who wait for a layer that won't be enqueued
  finish_if_ended(load);
}

void Transfers::cancel_all() {
  const std::vector<std::shared_ptr<LoadState>> loads = queue_.loads();
  for (const std::shared_ptr<LoadState>& load : loads) cancel(load);
}

void Transfers::feed() {
  std::vector<int> open(streams_.size());
  std::iota(open.begin(), open.end(), 0);
  const auto bytes = [this](int i) {
    return streams_[static_cast<std::size_t>(i)].bytes_in_flight();
  };
  while (!open.empty() && has_room()) {
    const auto stream = std::ranges::min_element(open, {}, bytes);
    const std::shared_ptr<LoadState> load = queue_.next(*stream);
    if (load == nullptr) {
      open.erase(stream);
    } else {
      enqueue(load, *stream);
    }
  }
}

void Transfers::force(const std::shared_ptr<LoadState>& load, int layer) {
  while (load->status == LoadStatus::loading &&
         load->layer(layer).state == LoadState::LayerState::waiting) {
    enqueue(load, load->in_flight > 0 ? load->stream : emptiest_stream());
  }
}

int Transfers::emptiest_stream() const {
  const auto emptiest = std::ranges::min_element(streams_, {}, &CopyStream::bytes_in_flight);
  return static_cast<int>(emptiest - streams_.begin());
}

// All streams share the link, so what is ahead on any of them delays what is urgent.
bool Transfers::has_room() const {
  std::size_t copies = 0;
  std::int64_t bytes = 0;
  for (const CopyStream& stream : streams_) {
    copies += stream.in_flight().size();
    bytes += stream.bytes_in_flight();
  }
  return copies < kLeastAhead ||
         static_cast<double>(bytes) < window_seconds_ * stats_.bytes_per_second;
}

void Transfers::enqueue(const std::shared_ptr<LoadState>& load, int stream) {
  const int index = load->order[load->next];
  LoadState::Layer& layer = load->layer(index);
  try {
    CopyStream& target = streams_[static_cast<std::size_t>(stream)];
    target.enqueue(load, index, table_->layer_data(load->slot, index), busy_streams(target));
    layer.event = target.in_flight().back().end;
  } catch (...) {
    fail_load(load, std::current_exception());
    return;
  }
  layer.state = LoadState::LayerState::copying;
  layer.times.queued = std::chrono::duration<double>(Clock::now() - load->start).count();
  load->served += layer.times.bytes;
  load->stream = stream;
  ++load->in_flight;
  load->skip_ahead();
  has_progress_ = true;
}

// With this one.
int Transfers::busy_streams(const CopyStream& own) const {
  const auto busy = std::ranges::count_if(streams_, [&](const CopyStream& stream) {
    return &stream == &own || !stream.in_flight().empty();
  });
  return static_cast<int>(busy);
}

void Transfers::harvest() {
  for (CopyStream& stream : streams_) harvest(stream);
}

void Transfers::harvest(CopyStream& stream) {
  try {
    while (!stream.in_flight().empty() && stream.is_front_done()) {
      const Copy& front = stream.in_flight().front();
      const double seconds = front.end->seconds_since(*front.begin);  // may fail: before the pop
      complete(stream.pop(), seconds);
    }
  } catch (...) {
    const std::exception_ptr error = std::current_exception();
    for (const Copy& copy : stream.reset()) {
      --copy.load->in_flight;
      copy.load->layer(copy.layer).event = nullptr;
      table_->unpublish(copy.load->slot, copy.layer);  // in stream order, ahead of its arrival
      fail_load(copy.load, error);
    }
  }
}

void Transfers::complete(const Copy& copy, double seconds) {
  LoadState& load = *copy.load;
  load.layer(copy.layer).times.transfer = seconds;
  stats_.queued_seconds += load.layer(copy.layer).times.queued;
  measure(copy, seconds);
  --load.in_flight;
  arrive(load, copy.layer);
  const std::shared_ptr<LoadState> current = by_slot_.at(load.slot);
  if (current != copy.load) {  // its successor
    arrive(*current, copy.layer);
    finish_if_ended(current);
  }
  finish_if_ended(copy.load);
  has_progress_ = true;
}

void Transfers::measure(const Copy& copy, double seconds) {
  ++stats_.layers;
  stats_.bytes += copy.bytes;
  stats_.transfer_seconds += seconds;
  last_arrival_ = Clock::now();
  if (seconds <= 0) return;
  const double rate = static_cast<double>(copy.bytes) / seconds * copy.sharers;
  double& measured = stats_.bytes_per_second;
  measured = measured <= 0 ? rate : measured + kNewest * (rate - measured);
}

void Transfers::arrive(LoadState& load, int index) {
  LoadState::Layer& layer = load.layer(index);
  if (layer.state == LoadState::LayerState::arrived) return;
  table_->publish(load.slot, index);
  layer.state = LoadState::LayerState::arrived;
  layer.event = nullptr;
  load.skip_ahead();
  load.arrived[static_cast<std::size_t>(index)].store(true, std::memory_order_release);
  load.num_arrived.fetch_add(1, std::memory_order_release);
}

void Transfers::fail_load(const std::shared_ptr<LoadState>& load, const std::exception_ptr& error) {
  if (load->status == LoadStatus::loading) {
    load->status = LoadStatus::failed;
    load->error = error;
    ++stats_.failed;
  }
  finish_if_ended(load);
  has_progress_ = true;
}

void Transfers::finish_if_ended(const std::shared_ptr<LoadState>& load) {
  const bool is_complete = load->num_arrived == static_cast<int>(load->order.size());
  if (load->status == LoadStatus::loading && is_complete) load->status = LoadStatus::loaded;
  if (load->status == LoadStatus::loading || load->in_flight > 0 || load->ended) return;
  load->ended = true;
  queue_.remove(*load);
  const std::shared_ptr<LoadState> predecessor = std::exchange(load->predecessor, nullptr);
  const auto current = by_slot_.find(load->slot);
  if (current->second == load) {
    if (predecessor != nullptr && !predecessor->ended) {
      current->second = predecessor;
    } else {
      by_slot_.erase(current);
    }
  }
  table_->release(load->slot);
  has_progress_ = true;
}

bool Transfers::is_idle() const {
  return std::ranges::all_of(streams_,
                             [](const CopyStream& stream) { return stream.in_flight().empty(); });
}

std::chrono::nanoseconds Transfers::nap() const {
  std::int64_t bytes = std::numeric_limits<std::int64_t>::max();
  for (const CopyStream& stream : streams_) {
    if (!stream.in_flight().empty()) bytes = std::min(bytes, stream.in_flight().front().bytes);
  }
  const double rate = stats_.bytes_per_second;
  if (rate <= 0) return kShortestNap;
  const std::chrono::duration<double> transfer(static_cast<double>(bytes) / rate);
  const auto left = transfer - (Clock::now() - last_arrival_);
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
      std::clamp<std::chrono::duration<double>>(left, kShortestNap, kLongestNap));
}

double Transfers::seconds_until(const LoadState& load, int layer) const {
  if (load.has_arrived(layer)) return 0;
  if (stats_.bytes_per_second <= 0) return std::numeric_limits<double>::infinity();
  std::int64_t ahead = 0;
  std::int64_t own = 0;
  const std::size_t last = load.position(layer);
  for (std::size_t i = 0; i <= last; ++i) {
    const LoadState::Layer& entry = load.layers[static_cast<std::size_t>(load.order[i])];
    if (entry.state != LoadState::LayerState::arrived) own += entry.times.bytes;
  }
  for (const CopyStream& stream : streams_) {
    for (const Copy& copy : stream.in_flight()) {
      if (copy.load.get() != &load) ahead += copy.bytes;
    }
  }
  const double bytes = static_cast<double>(own) * queue_.sharers(load) + static_cast<double>(ahead);
  const double since = std::chrono::duration<double>(Clock::now() - last_arrival_).count();
  return std::max(bytes / stats_.bytes_per_second - since, 0.0);
}

LoaderStats Transfers::stats() const {
  LoaderStats stats = stats_;
  for (const std::shared_ptr<LoadState>& load : queue_.loads()) {
    for (const LoadState::Layer& layer : load->layers) {
      if (layer.state != LoadState::LayerState::arrived) stats.queued_bytes += layer.times.bytes;
    }
  }
  return stats;
}

}  // namespace toppings
