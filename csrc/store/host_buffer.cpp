// SPDX-License-Identifier: Apache-2.0
#include "store/host_buffer.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

namespace toppings {
namespace {

// Addresses cost next to nothing, so there are enough for holes between images (first fit needs
// less than twice their bytes in practice) and for small images rounded up to pages. A budget
// beyond the machine's memory asks for no more than that memory needs.
std::size_t region_bytes(std::int64_t limit) {
  constexpr std::size_t kHoles = 4;
  constexpr std::size_t kPages = std::size_t{1} << 30;
  const std::size_t memory = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) *
                             static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  return kHoles * std::min(static_cast<std::size_t>(limit), memory) + kPages;
}

}  // namespace

HostBudget::HostBudget(std::shared_ptr<Device> from, std::int64_t most, bool is_shared)
    : device(std::move(from)),
      limit(most),
      region(is_shared || device->is_in_place()
                 ? std::make_unique<HostRegion>(region_bytes(most), is_shared)
                 : nullptr) {}

void HostBudget::give_back(std::int64_t bytes) noexcept {
  const std::lock_guard lock(mutex);
  used -= bytes;
  if (!waiting.empty()) waiting.front().notify_one();
}

HostBuffer::HostBuffer(std::shared_ptr<HostBudget> budget) : budget_(std::move(budget)) {}

HostBuffer::~HostBuffer() {
  if (budget_->region != nullptr) {
    if (data_ != nullptr) budget_->device->page_unlock(data_);
    budget_->region->deallocate(data_, bytes_);
  } else {
    budget_->device->deallocate_host(data_, bytes_);
  }
  // After the memory is back: used never claims less than is held.
  if (charge_ != 0) budget_->give_back(charge_);
}

void HostBuffer::set_charge(std::int64_t bytes, std::int64_t inherited) noexcept {
  charge_ = bytes;
  budget_->used += bytes - inherited;
}

std::int64_t HostBuffer::give_up_charge() noexcept { return std::exchange(charge_, 0); }

void HostBuffer::allocate() {
  const auto bytes = static_cast<std::size_t>(charge_);
  if (budget_->region == nullptr) {
    data_ = static_cast<std::byte*>(budget_->device->allocate_host(bytes));
  } else {
    std::byte* data = budget_->region->allocate(bytes);
    try {
      budget_->device->page_lock(data, bytes);
    } catch (...) {
      budget_->region->deallocate(data, bytes);
      throw;
    }
    data_ = data;
  }
  bytes_ = bytes;
}

}  // namespace toppings
