// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>

#include <memory>

namespace toppings::testing {

// Another device in all it does, but for what a test overrides.
class ForwardingDevice : public Device {
 public:
  explicit ForwardingDevice(std::shared_ptr<Device> host) : host_(std::move(host)) {}

  DeviceKind kind() const noexcept override { return host_->kind(); }
  int index() const noexcept override { return host_->index(); }
  std::string_view name() const noexcept override { return host_->name(); }
  bool is_in_place() const noexcept override { return host_->is_in_place(); }
  void* allocate(std::size_t bytes) override { return host_->allocate(bytes); }
  void deallocate(void* data, std::size_t bytes) noexcept override {
    host_->deallocate(data, bytes);
  }
  void* allocate_host(std::size_t bytes) override { return host_->allocate_host(bytes); }
  void deallocate_host(void* data, std::size_t bytes) noexcept override {
    host_->deallocate_host(data, bytes);
  }
  void page_lock(void* data, std::size_t bytes) override { host_->page_lock(data, bytes); }
  void page_unlock(void* data) noexcept override { host_->page_unlock(data); }
  std::unique_ptr<Stream> make_stream() override { return host_->make_stream(); }
  std::unique_ptr<Event> make_event() override { return host_->make_event(); }
  std::unique_ptr<Stream> wrap_stream(void* native) override { return host_->wrap_stream(native); }
  void copy(void* dst, const void* src, std::size_t bytes) override {
    host_->copy(dst, src, bytes);
  }

 private:
  std::shared_ptr<Device> host_;
};

// A host device that passes for one with memory of its own, so that whatever is done for a GPU
// (copies of tables, waits in stream order) happens on it.
class RemoteDevice final : public ForwardingDevice {
 public:
  using ForwardingDevice::ForwardingDevice;

  DeviceKind kind() const noexcept override { return DeviceKind::cuda; }
  std::string_view name() const noexcept override { return "remote"; }
  bool is_in_place() const noexcept override { return false; }
};

}  // namespace toppings::testing
