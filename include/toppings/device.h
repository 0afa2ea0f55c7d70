// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>

#include <cstddef>
#include <memory>
#include <string_view>

namespace toppings {

// The only door to memory that adapters live in. Thread-safe.
class TOPPINGS_EXPORT Device {
 public:
  virtual ~Device() = default;

  virtual std::string_view name() const noexcept = 0;  // "host", "cuda:0"

  // Device memory, 64-byte aligned, zero-filled. Throws out_of_memory, or invalid_argument for 0
  // bytes. deallocate takes the size that was asked for; a null pointer is ignored.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void deallocate(void* data, std::size_t bytes) noexcept = 0;

  // The same for host memory that this device copies from at full speed (page-locked where that
  // means something).
  virtual void* allocate_host(std::size_t bytes) = 0;
  virtual void deallocate_host(void* data, std::size_t bytes) noexcept = 0;

  // Host to device; done when the call returns.
  virtual void copy(void* device_dst, const void* host_src, std::size_t bytes) = 0;
};

// Main memory as a device: allocate and allocate_host are the same memory and copy is a memcpy.
TOPPINGS_EXPORT std::shared_ptr<Device> host_device();

}  // namespace toppings
