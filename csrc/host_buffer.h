// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace toppings {

// How many bytes the buffers of one store hold or have reserved. It outlives the store while
// someone still holds an image of it.
struct HostBudget {
  std::shared_ptr<Device> device;
  std::int64_t limit;
  // Grows only under the store's lock, so that "fits" stays true until it is acted on; shrinks from
  // any thread at any time.
  std::atomic<std::int64_t> used = 0;
};

// Memory for one image. First charged to the budget, then allocated; the destructor undoes both.
class HostBuffer {
 public:
  explicit HostBuffer(std::shared_ptr<HostBudget> budget);
  ~HostBuffer();
  HostBuffer(const HostBuffer&) = delete;
  HostBuffer& operator=(const HostBuffer&) = delete;

  const HostBudget* budget() const noexcept { return budget_.get(); }
  std::byte* data() const noexcept { return data_; }
  std::int64_t charge() const noexcept { return charge_; }

  // Charges `bytes` to the budget, of which `inherited` were taken over from other buffers.
  void set_charge(std::int64_t bytes, std::int64_t inherited) noexcept;

  // For a buffer that is about to be destroyed: its bytes now count for another one.
  std::int64_t give_up_charge() noexcept;

  // Allocates what was charged. Throws out_of_memory.
  void allocate();

 private:
  std::shared_ptr<HostBudget> budget_;
  std::int64_t charge_ = 0;
  std::size_t bytes_ = 0;
  std::byte* data_ = nullptr;
};

}  // namespace toppings
