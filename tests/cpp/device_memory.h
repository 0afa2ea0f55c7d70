// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

namespace toppings::testing {

constexpr std::chrono::seconds kPatience{60};  // for what must happen

// Host memory of a device, with words to wait for at its beginning.
class Memory {
 public:
  Memory(std::shared_ptr<Device> device, std::size_t bytes)
      : device_(std::move(device)),
        bytes_(bytes),
        data_(static_cast<std::byte*>(device_->allocate_host(bytes))) {}
  ~Memory() { device_->deallocate_host(data_, bytes_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  std::byte* data() const { return data_; }
  std::uint32_t* word(std::size_t index) const {
    return reinterpret_cast<std::uint32_t*>(data_) + index;
  }
  std::uint32_t load(std::size_t index) const {
    return std::atomic_ref(*word(index)).load(std::memory_order_acquire);
  }
  void store(std::size_t index, std::uint32_t value) {
    std::atomic_ref(*word(index)).store(value, std::memory_order_release);
  }

 private:
  std::shared_ptr<Device> device_;
  std::size_t bytes_;
  std::byte* data_;
};

class DeviceMemory {
 public:
  DeviceMemory(std::shared_ptr<Device> device, std::size_t bytes)
      : device_(std::move(device)),
        bytes_(bytes),
        data_(static_cast<std::byte*>(device_->allocate(bytes))) {}
  ~DeviceMemory() { device_->deallocate(data_, bytes_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  std::byte* data() const { return data_; }

 private:
  std::shared_ptr<Device> device_;
  std::size_t bytes_;
  std::byte* data_;
};

}  // namespace toppings::testing
