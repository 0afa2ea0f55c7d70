// SPDX-License-Identifier: Apache-2.0
#include <toppings/device.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>

#include "check.h"
#include "host/affinity.h"
#include "host/host_event.h"
#include "host/host_link.h"
#include "host/host_memory.h"
#include "host/host_stream.h"

namespace toppings {
namespace {

std::string name_of(const std::optional<HostLink>& link) {
  if (!link) return "host";
  const bool is_giga = link->bytes_per_second >= 1e8;
  std::array<char, 96> name;
  const double rate = link->bytes_per_second / (is_giga ? 1e9 : 1e6);
  std::snprintf(name.data(), name.size(), "host, link of %.1f %s/s and %.3g us (emulated)", rate,
                is_giga ? "GB" : "MB", link->latency_seconds * 1e6);
  return name.data();
}

void check_link(const HostLink& link) {
  if (!std::isfinite(link.bytes_per_second) || link.bytes_per_second <= 0) {
    fail(Status::invalid_argument, "bytes_per_second", "finite and positive",
         std::to_string(link.bytes_per_second));
  }
  if (!std::isfinite(link.latency_seconds) || link.latency_seconds < 0) {
    fail(Status::invalid_argument, "latency_seconds", "finite and not negative",
         std::to_string(link.latency_seconds));
  }
  check_cpu("cpu", link.cpu);
}

class HostDevice final : public Device {
 public:
  explicit HostDevice(const std::optional<HostLink>& link) : name_(name_of(link)) {
    if (!link) return;
    link_ = std::make_shared<SharedLink>(*link);
    cpu_ = link->cpu;
  }

  DeviceKind kind() const noexcept override { return DeviceKind::host; }
  int index() const noexcept override { return 0; }
  std::string_view name() const noexcept override { return name_; }
  bool is_in_place() const noexcept override { return link_ == nullptr; }

  void* allocate(std::size_t bytes) override { return allocate_memory(bytes); }
  void deallocate(void* data, std::size_t bytes) noexcept override {
    deallocate_memory(data, bytes);
  }
  void* allocate_host(std::size_t bytes) override { return allocate_memory(bytes); }
  void deallocate_host(void* data, std::size_t bytes) noexcept override {
    deallocate_memory(data, bytes);
  }
  void page_lock(void*, std::size_t) override {}
  void page_unlock(void*) noexcept override {}

  std::unique_ptr<Stream> make_stream() override {
    return std::make_unique<HostStream>(*this, link_, cpu_);
  }
  std::unique_ptr<Event> make_event() override { return std::make_unique<HostEvent>(*this); }
  std::unique_ptr<Stream> wrap_stream(void* native) override {
    if (native != nullptr) {
      fail(Status::invalid_argument, "native", "null, the calling thread", "a pointer");
    }
    return std::make_unique<CallingThread>(*this, link_);
  }

  void copy(void* device_dst, const void* host_src, std::size_t bytes) override {
    copy_now(link_.get(), device_dst, host_src, bytes);
  }

 private:
  std::string name_;
  std::shared_ptr<SharedLink> link_;  // null: none
  int cpu_ = -1;
};

}  // namespace

std::shared_ptr<Device> host_device(std::optional<HostLink> link) {
  if (link) {
    check_link(*link);
    return std::make_shared<HostDevice>(link);
  }
  static const auto device = std::make_shared<HostDevice>(std::nullopt);
  return device;
}

}  // namespace toppings
