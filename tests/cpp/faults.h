// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>
#include <toppings/error.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "forwarding_device.h"

namespace toppings::testing {

// Calls of a device that can be made to fail. lose_copy: the copy is accepted and never runs, and
// the stream has failed from then on, as its events tell.
enum class Call : std::size_t {
  allocate,
  allocate_host,
  make_stream,
  make_event,
  copy,
  lose_copy,
  record,
  stream_wait,
  synchronize,
  is_done,
  wait_for,
  seconds_since,
};
inline constexpr std::size_t kNumCalls = 12;
inline constexpr std::array<const char*, kNumCalls> kCallNames = {
    "allocate", "allocate_host", "make_stream", "make_event", "copy",     "lose_copy",
    "record",   "stream_wait",   "synchronize", "is_done",    "wait_for", "seconds_since"};

inline Error device_failure(const std::string& what) {
  return {Status::device_failed, what + ": expected success, got an injected failure"};
}

// Which call fails, shared by a device and all that it made. Thread-safe once it is armed.
class FaultPlan {
 public:
  // The nth such call from now on fails (counted from 1), and when it lasts all after it.
  void arm(Call call, int nth, bool lasts = false) {
    call_ = call;
    nth_ = counts_[static_cast<std::size_t>(call)] + nth;
    lasts_ = lasts;
    fired_ = false;
    is_armed_ = true;
  }
  void disarm() { is_armed_ = false; }
  bool has_fired() const { return fired_; }
  int count(Call call) const { return counts_[static_cast<std::size_t>(call)]; }

  bool fails(Call call) {
    const int count = ++counts_[static_cast<std::size_t>(call)];
    if (!is_armed_ || call != call_ || count < nth_ || (count > nth_ && !lasts_)) return false;
    fired_ = true;
    return true;
  }

  void check(Call call) {
    if (fails(call)) throw device_failure(kCallNames[static_cast<std::size_t>(call)]);
  }

 private:
  std::array<std::atomic<int>, kNumCalls> counts_{};
  Call call_{};
  int nth_ = 0;
  bool lasts_ = false;
  std::atomic<bool> is_armed_ = false;
  std::atomic<bool> fired_ = false;
};

class FaultyEvent final : public Event {
 public:
  FaultyEvent(FaultPlan& plan, std::unique_ptr<Event> inner)
      : plan_(plan), inner_(std::move(inner)) {}

  bool is_done() const override {
    plan_.check(Call::is_done);
    check();
    return inner_->is_done();
  }
  bool wait_for(std::chrono::nanoseconds timeout) const override {
    plan_.check(Call::wait_for);
    check();
    return inner_->wait_for(timeout);
  }
  double seconds_since(const Event& earlier) const override {
    plan_.check(Call::seconds_since);
    return inner_->seconds_since(*dynamic_cast<const FaultyEvent&>(earlier).inner_);
  }

 private:
  friend class FaultyStream;
  void check() const {
    if (is_lost_) throw device_failure("a stream's work");
  }

  FaultPlan& plan_;
  std::unique_ptr<Event> inner_;
  std::atomic<bool> is_lost_ = false;  // recorded after a copy that was lost
};

class FaultyStream final : public Stream {
 public:
  FaultyStream(FaultPlan& plan, std::unique_ptr<Stream> inner)
      : plan_(plan), inner_(std::move(inner)) {}

  void copy(void* device_dst, const void* host_src, std::size_t bytes) override {
    plan_.check(Call::copy);
    if (plan_.fails(Call::lose_copy)) is_lost_ = true;
    if (!is_lost_) inner_->copy(device_dst, host_src, bytes);
  }
  void record(Event& event) override {
    plan_.check(Call::record);
    auto& own = dynamic_cast<FaultyEvent&>(event);
    inner_->record(*own.inner_);
    own.is_lost_ = is_lost_.load();
  }
  void wait(const Event& event) override {
    plan_.check(Call::stream_wait);
    const auto& own = dynamic_cast<const FaultyEvent&>(event);
    if (own.is_lost_) is_lost_ = true;
    inner_->wait(*own.inner_);
  }
  void write_value(std::uint32_t* address, std::uint32_t value) override {
    inner_->write_value(address, value);
  }
  void wait_value(const std::uint32_t* address, std::uint32_t value) override {
    inner_->wait_value(address, value);
  }
  void synchronize() override {
    inner_->synchronize();
    plan_.check(Call::synchronize);
    if (is_lost_) throw device_failure("a stream's work");
  }
  void* native() const noexcept override { return inner_->native(); }

 private:
  FaultPlan& plan_;
  std::unique_ptr<Stream> inner_;
  std::atomic<bool> is_lost_ = false;
};

// Another device with failures by plan. With kind cuda the runtime treats its memory as a GPU's.
class FaultyDevice final : public ForwardingDevice {
 public:
  explicit FaultyDevice(std::shared_ptr<Device> inner, DeviceKind kind = DeviceKind::host)
      : ForwardingDevice(std::move(inner)), kind_(kind) {}

  FaultPlan& plan() noexcept { return plan_; }

  DeviceKind kind() const noexcept override { return kind_; }
  std::string_view name() const noexcept override { return "a device that fails on purpose"; }
  bool is_in_place() const noexcept override { return false; }

  void* allocate(std::size_t bytes) override {
    check_memory(Call::allocate);
    return ForwardingDevice::allocate(bytes);
  }
  void* allocate_host(std::size_t bytes) override {
    check_memory(Call::allocate_host);
    return ForwardingDevice::allocate_host(bytes);
  }
  std::unique_ptr<Stream> make_stream() override {
    plan_.check(Call::make_stream);
    return std::make_unique<FaultyStream>(plan_, ForwardingDevice::make_stream());
  }
  std::unique_ptr<Event> make_event() override {
    plan_.check(Call::make_event);
    return std::make_unique<FaultyEvent>(plan_, ForwardingDevice::make_event());
  }
  std::unique_ptr<Stream> wrap_stream(void* native) override {
    return std::make_unique<FaultyStream>(plan_, ForwardingDevice::wrap_stream(native));
  }

 private:
  void check_memory(Call call) {
    if (!plan_.fails(call)) return;
    throw Error(Status::out_of_memory, "memory: expected some, got an injected failure");
  }

  FaultPlan plan_;
  DeviceKind kind_;
};

}  // namespace toppings::testing
