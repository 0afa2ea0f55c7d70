// SPDX-License-Identifier: Apache-2.0
#include "slots/lora_tables.h"

#include <algorithm>
#include <utility>

namespace toppings {
namespace {

// Of all tables, or many more of one layer's, before the host would wait for the first one.
constexpr std::size_t kStagedUploads = 4;

}  // namespace

LoraTables::LoraTables(std::shared_ptr<Device> device, const ModelShape& shape, int num_slots)
    : device_(std::move(device)), num_slots_(num_slots) {
  first_row_.push_back(0);
  for (int layer = 0; layer < shape.num_layers(); ++layer) {
    first_row_.push_back(first_row_.back() + static_cast<int>(shape.layer(layer).size()));
  }
  const auto cells = static_cast<std::size_t>(num_rows()) * static_cast<std::size_t>(num_slots);
  slots_.resize(3 * cells);
  scales_.resize(cells);
  changed_.resize(static_cast<std::size_t>(shape.num_layers()));
  if (device_->kind() == DeviceKind::host || cells == 0) return;
  const std::size_t bytes = std::span(slots_).size_bytes() + std::span(scales_).size_bytes();
  staging_ = std::make_unique<StagingRing>(device_, kStagedUploads * bytes);
  device_slots_ = static_cast<std::byte*>(device_->allocate(std::span(slots_).size_bytes()));
  try {
    device_scales_ = static_cast<std::byte*>(device_->allocate(std::span(scales_).size_bytes()));
  } catch (...) {
    device_->deallocate(device_slots_, std::span(slots_).size_bytes());
    throw;
  }
}

LoraTables::~LoraTables() {
  staging_.reset();  // nothing writes to the tables any more
  device_->deallocate(device_slots_, std::span(slots_).size_bytes());
  device_->deallocate(device_scales_, std::span(scales_).size_bytes());
}

void LoraTables::set(int layer, int projection, int slot, std::int64_t a_offset,
                     std::int64_t b_offset, std::int64_t rank, float scale) noexcept {
  const auto l = static_cast<std::size_t>(layer);
  const auto cell =
      static_cast<std::size_t>(first_row_[l] + projection) * static_cast<std::size_t>(num_slots_) +
      static_cast<std::size_t>(slot);
  slots_[3 * cell] = a_offset;
  slots_[3 * cell + 1] = b_offset;
  slots_[3 * cell + 2] = rank;
  scales_[cell] = scale;
  changed_[l] = true;
}

void LoraTables::clear(int slot) noexcept {
  for (std::size_t cell = static_cast<std::size_t>(slot); cell < scales_.size();
       cell += static_cast<std::size_t>(num_slots_)) {
    std::fill_n(slots_.begin() + static_cast<std::ptrdiff_t>(3 * cell), 3, 0);
    scales_[cell] = 0;
  }
  std::fill(changed_.begin(), changed_.end(), true);
}

void LoraTables::clear(int layer, int slot) noexcept {
  const auto slots = static_cast<std::size_t>(num_slots_);
  for (std::size_t row = this->row(layer); row < this->row(layer + 1); ++row) {
    const std::size_t cell = row * slots + static_cast<std::size_t>(slot);
    std::fill_n(slots_.begin() + static_cast<std::ptrdiff_t>(3 * cell), 3, 0);
    scales_[cell] = 0;
  }
  changed_[static_cast<std::size_t>(layer)] = true;
}

const std::int64_t* LoraTables::device_slots() const noexcept {
  if (device_slots_ == nullptr) return slots_.data();
  return reinterpret_cast<const std::int64_t*>(device_slots_);
}

const float* LoraTables::device_scales() const noexcept {
  if (device_scales_ == nullptr) return scales_.data();
  return reinterpret_cast<const float*>(device_scales_);
}

void LoraTables::upload(Stream& stream, int first, int last) {
  if (staging_ == nullptr) return;
  while (first < last) {
    if (!changed_[static_cast<std::size_t>(first)]) {
      ++first;
      continue;
    }
    int end = first + 1;
    while (end < last && changed_[static_cast<std::size_t>(end)]) ++end;
    upload_run(stream, first, end);
    first = end;
  }
}

void LoraTables::upload_run(Stream& stream, int first, int last) {
  const auto copy = [&](std::byte* device, const auto& table, std::size_t row_size) {
    const std::size_t begin = row(first) * row_size;
    const std::size_t size = row(last) * row_size - begin;
    staging_->copy(stream, device + begin * sizeof(table[0]), table.data() + begin,
                   size * sizeof(table[0]));
  };
  const auto slots = static_cast<std::size_t>(num_slots_);
  copy(device_slots_, slots_, 3 * slots);
  copy(device_scales_, scales_, slots);
  std::fill(changed_.begin() + first, changed_.begin() + last, false);
}

}  // namespace toppings
