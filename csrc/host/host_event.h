// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "host/spin.h"

namespace toppings {

// One pass of a stream over one record(). Events can be recorded again, and destroyed, while a
// stream has yet to get there, so this is what both hold. Thread-safe.
class HostRecord {
 public:
  // One of the two, once.
  void complete(SteadyTime when);
  void fail(std::string why);

  // These throw device_failed after fail().
  bool is_done() const;
  bool wait_until(SteadyTime deadline) const;  // false when the time ran out

  bool has_succeeded() const noexcept;

  // When it is done.
  SteadyTime time() const noexcept { return time_; }

 private:
  void finish(std::uint32_t state);

  std::atomic<std::uint32_t> state_{0};
  mutable std::atomic<std::uint32_t> sleepers_{0};
  SteadyTime time_;
  std::string why_;
};

class HostEvent final : public Event {
 public:
  explicit HostEvent(const Device& device) : device_(&device) {}

  bool is_done() const override;
  bool wait_for(std::chrono::nanoseconds timeout) const override;
  double seconds_since(const Event& earlier) const override;

  const Device& device() const noexcept { return *device_; }

  // Only once the record is in its stream's queue, so that nothing can wait for it ahead of it.
  void set_last(std::shared_ptr<HostRecord> record);

  // The last record; null before the first.
  std::shared_ptr<HostRecord> last() const;

 private:
  SteadyTime time(const char* what) const;

  const Device* device_;
  mutable std::mutex mutex_;
  std::shared_ptr<HostRecord> last_;
};

// Throw invalid_argument for an event of another device.
HostEvent& host_event(Event& event, const Device& device);
const HostEvent& host_event(const Event& event, const Device& device);

}  // namespace toppings
