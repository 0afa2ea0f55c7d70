// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>
#include <toppings/dtype.h>
#include <toppings/export.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace toppings {

// Device memory for adapters: one allocation per layer, all of one size, of one dtype. An adapter
// has one offset, valid in every layer. Who lies where is the slot table's business.
class TOPPINGS_EXPORT Arena {
 public:
  // bytes_per_layer is rounded up to kBlockAlignment. Throws invalid_argument or out_of_memory.
  Arena(std::shared_ptr<Device> device, int num_layers, std::int64_t bytes_per_layer, DType dtype);
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  Device& device() const noexcept { return *device_; }
  DType dtype() const noexcept { return dtype_; }
  int num_layers() const noexcept { return static_cast<int>(layers_.size()); }
  std::int64_t bytes_per_layer() const noexcept { return bytes_per_layer_; }
  std::byte* layer(int layer) const;  // [bytes_per_layer], 64-byte aligned, zero at first

 private:
  void deallocate() noexcept;

  std::shared_ptr<Device> device_;
  std::int64_t bytes_per_layer_;
  DType dtype_;
  std::vector<std::byte*> layers_;
};

}  // namespace toppings
