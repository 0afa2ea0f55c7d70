// SPDX-License-Identifier: Apache-2.0
#include "host/host_event.h"

#include <utility>

#include "check.h"
#include "host/futex.h"

namespace toppings {
namespace {

constexpr std::uint32_t kPending = 0, kDone = 1, kFailed = 2;

static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t));

const std::uint32_t* word_of(const std::atomic<std::uint32_t>& state) {
  return reinterpret_cast<const std::uint32_t*>(&state);
}

}  // namespace

void HostRecord::complete(SteadyTime when) {
  time_ = when;
  finish(kDone);
}

void HostRecord::fail(std::string why) {
  why_ = std::move(why);
  finish(kFailed);
}

// A sleeper counts itself before it looks at the state, and here the state is set before the
// sleepers are counted: in the one order that all threads see, one of the two notices the other.
void HostRecord::finish(std::uint32_t state) {
  state_.store(state);
  if (sleepers_.load() > 0) futex_wake(word_of(state_));
}

bool HostRecord::has_succeeded() const noexcept { return state_.load() == kDone; }

bool HostRecord::is_done() const {
  const std::uint32_t state = state_.load();
  if (state == kFailed) toppings::fail(Status::device_failed, "a stream's work", "success", why_);
  return state == kDone;
}

bool HostRecord::wait_until(SteadyTime deadline) const {
  const auto done = [&] { return is_done(); };
  if (done()) return true;
  const SteadyTime spun = steady_now() + kSpin;
  if (spin_until(deadline < spun ? deadline : spun, done)) return true;
  sleepers_.fetch_add(1);
  for (;;) {
    const auto left = deadline - steady_now();
    if (state_.load() != kPending || left <= left.zero()) break;
    futex_wait(word_of(state_), kPending, left);
  }
  sleepers_.fetch_sub(1);
  return done();
}

bool HostEvent::is_done() const {
  const auto record = last();
  return record == nullptr || record->is_done();
}

bool HostEvent::wait_for(std::chrono::nanoseconds timeout) const {
  const auto record = last();
  return record == nullptr || record->wait_until(steady_deadline(timeout));
}

double HostEvent::seconds_since(const Event& earlier) const {
  const SteadyTime begin = host_event(earlier, *device_).time("the earlier event");
  return std::chrono::duration<double>(time("the event") - begin).count();
}

SteadyTime HostEvent::time(const char* what) const {
  const auto record = last();
  if (record == nullptr || !record->is_done()) {
    fail(Status::invalid_argument, what, "one that was recorded and is done",
         record == nullptr ? "one never recorded" : "one that isn't done");
  }
  return record->time();
}

void HostEvent::set_last(std::shared_ptr<HostRecord> record) {
  const std::lock_guard lock(mutex_);
  last_ = std::move(record);
}

std::shared_ptr<HostRecord> HostEvent::last() const {
  const std::lock_guard lock(mutex_);
  return last_;
}

const HostEvent& host_event(const Event& event, const Device& device) {
  const auto* own = dynamic_cast<const HostEvent*>(&event);
  if (own == nullptr || &own->device() != &device) {
    fail(Status::invalid_argument, "event", "one of " + std::string(device.name()),
         "another device's");
  }
  return *own;
}

HostEvent& host_event(Event& event, const Device& device) {
  return const_cast<HostEvent&>(host_event(std::as_const(event), device));
}

}  // namespace toppings
