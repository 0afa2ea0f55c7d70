// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>
#include <toppings/model_shape.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "slots/staging_ring.h"

namespace toppings {

// Where the operators find A and B of every slot in every projection (row), and the scale: in host
// memory, and on a device with memory of its own a copy there. Not thread-safe.
class LoraTables {
 public:
  LoraTables(std::shared_ptr<Device> device, const ModelShape& shape, int num_slots);
  ~LoraTables();
  LoraTables(const LoraTables&) = delete;
  LoraTables& operator=(const LoraTables&) = delete;

  int num_rows() const noexcept { return first_row_.back(); }

  // Elements from the start of the layer's arena.
  void set(int layer, int projection, int slot, std::int64_t a_offset, std::int64_t b_offset,
           std::int64_t rank, float scale) noexcept;

  // Rank 0 in every row of the slot, or of one layer.
  void clear(int slot) noexcept;
  void clear(int layer, int slot) noexcept;

  std::span<const std::int64_t> slots() const noexcept { return slots_; }
  std::span<const float> scales() const noexcept { return scales_; }
  const std::int64_t* device_slots() const noexcept;
  const float* device_scales() const noexcept;

  // Brings layers [first, last) of the copy up to date in stream order.
  void upload(Stream& stream, int first, int last);

 private:
  std::size_t row(int layer) const {
    return static_cast<std::size_t>(first_row_[static_cast<std::size_t>(layer)]);
  }
  void upload_run(Stream& stream, int first, int last);

  std::shared_ptr<Device> device_;
  int num_slots_;
  std::vector<int> first_row_;       // [num_layers + 1]
  std::vector<std::int64_t> slots_;  // [num_rows, num_slots, 3]
  std::vector<float> scales_;        // [num_rows, num_slots]
  std::vector<bool> changed_;        // [num_layers] since the layer's last upload

  // Where the device has memory of its own; null elsewhere.
  std::unique_ptr<StagingRing> staging_;
  std::byte* device_slots_ = nullptr;
  std::byte* device_scales_ = nullptr;
};

}  // namespace toppings
