// SPDX-License-Identifier: Apache-2.0
#include "host_buffer.h"

#include <utility>

namespace toppings {

HostBuffer::HostBuffer(std::shared_ptr<HostBudget> budget) : budget_(std::move(budget)) {}

HostBuffer::~HostBuffer() {
  budget_->device->deallocate_host(data_, bytes_);
  budget_->used -= charge_;  // after the memory is back: used never claims less than is held
}

void HostBuffer::set_charge(std::int64_t bytes, std::int64_t inherited) noexcept {
  charge_ = bytes;
  budget_->used += bytes - inherited;
}

std::int64_t HostBuffer::give_up_charge() noexcept { return std::exchange(charge_, 0); }

void HostBuffer::allocate() {
  const auto bytes = static_cast<std::size_t>(charge_);
  data_ = static_cast<std::byte*>(budget_->device->allocate_host(bytes));
  bytes_ = bytes;
}

}  // namespace toppings
