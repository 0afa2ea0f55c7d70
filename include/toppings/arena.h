// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>
#include <toppings/dtype.h>
#include <toppings/export.h>
#include <toppings/host_store.h>

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

  // An arena without memory of its own: adapters stay where their images lie in the store, whose
  // whole range of addresses is every layer. Throws invalid_argument unless the store's device
  // is_in_place().
  static std::shared_ptr<Arena> in_place(std::shared_ptr<HostStore> store, int num_layers,
                                         DType dtype);

  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  const std::shared_ptr<Device>& device() const noexcept { return device_; }
  bool is_in_place() const noexcept { return store_ != nullptr; }
  DType dtype() const noexcept { return dtype_; }
  int num_layers() const noexcept { return static_cast<int>(layers_.size()); }
  std::int64_t bytes_per_layer() const noexcept { return bytes_per_layer_; }
  std::byte* layer(int layer) const;  // [bytes_per_layer], 64-byte aligned, zero at first

 private:
  Arena() = default;
  void deallocate() noexcept;

  std::shared_ptr<Device> device_;
  std::shared_ptr<HostStore> store_;  // where adapters stay in place; null otherwise
  std::int64_t bytes_per_layer_ = 0;
  DType dtype_ = DType::f32;
  std::vector<std::byte*> layers_;
};

}  // namespace toppings
