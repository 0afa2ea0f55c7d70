// SPDX-License-Identifier: Apache-2.0
#include <toppings/loader.h>

#include <cmath>
#include <string>
#include <utility>

#include "check.h"
#include "host/affinity.h"
#include "load/loader_core.h"

namespace toppings {
namespace {

[[noreturn]] void fail_cancelled() {
  fail(Status::cancelled, "ticket", "one under way", "a cancelled one");
}

}  // namespace

Loader::Loader(std::shared_ptr<SlotTable> table, LoaderOptions options) {
  if (table == nullptr) fail(Status::invalid_argument, "table", "a slot table", "null");
  check_positive("num_streams", options.num_streams);
  if (!std::isfinite(options.window_seconds) || options.window_seconds < 0) {
    fail(Status::invalid_argument, "window_seconds", "a finite number of at least 0",
         std::to_string(options.window_seconds));
  }
  check_cpu("cpu", options.cpu);
  core_ = std::make_shared<LoaderCore>(std::move(table), options);
  core_->start_thread();
}

Loader::~Loader() { core_->stop(); }

Ticket Loader::load(int slot, LoadPriority priority, std::vector<int> order) {
  return Ticket(core_->load(slot, priority, std::move(order)));
}

const std::shared_ptr<SlotTable>& Loader::table() const noexcept { return core_->table(); }
Loader::Stats Loader::stats() const { return core_->stats(); }

Ticket::Ticket(std::shared_ptr<LoadState> load) : load_(std::move(load)) {}
Ticket::~Ticket() = default;

int Ticket::slot() const noexcept { return load_->slot; }

const std::shared_ptr<Device>& Ticket::device() const noexcept {
  return load_->core->table()->arena()->device();
}

LoadStatus Ticket::status() const {
  return is_cancelled_ ? LoadStatus::cancelled : load_->core->status(*load_);
}

int Ticket::num_arrived() const noexcept { return load_->num_arrived; }

bool Ticket::has_arrived(int layer) const {
  check_layer(layer);
  return load_->has_arrived(layer);
}

double Ticket::seconds_until(int layer) const {
  check_layer(layer);
  return load_->core->seconds_until(*load_, layer);
}

void Ticket::wait(int layer, Stream& stream) {
  check_wait(layer);
  load_->core->wait(*load_, layer, stream);
}

bool Ticket::wait_for(int layer, std::chrono::nanoseconds timeout) {
  check_wait(layer);
  return load_->core->wait_for(*load_, layer, timeout);
}

bool Ticket::wait_for_all(std::chrono::nanoseconds timeout) {
  if (is_cancelled_ && num_arrived() < static_cast<int>(load_->layers.size())) fail_cancelled();
  return load_->core->wait_for_all(*load_, timeout);
}

void Ticket::cancel() { load_->core->withdraw(*load_, is_cancelled_); }

void Ticket::raise(LoadPriority priority) { load_->core->raise(*load_, priority); }
std::vector<LayerTimes> Ticket::times() const { return load_->core->times(*load_); }

void Ticket::check_layer(int layer) const {
  check_index("layer", layer, static_cast<std::int64_t>(load_->layers.size()));
}

void Ticket::check_wait(int layer) const {
  check_layer(layer);
  if (is_cancelled_ && !load_->has_arrived(layer)) fail_cancelled();
}

}  // namespace toppings
