// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>

#include "store/host_region.h"

namespace toppings {

// How many bytes the buffers of one store hold or have reserved, and who waits for some of them. It
// outlives the store while someone still holds an image of it.
struct HostBudget {
  // is_shared: in a region that other processes may map, whatever the device.
  HostBudget(std::shared_ptr<Device> from, std::int64_t most, bool is_shared);

  // `bytes` are held no more; even with 0 there may be room now, since an image became idle. Never
  // call it, nor destroy a HostBuffer, under the mutex.
  void give_back(std::int64_t bytes) noexcept;

  const std::shared_ptr<Device> device;
  const std::int64_t limit;
  const std::unique_ptr<HostRegion> region;  // where the buffers lie; null: device.allocate_host

  std::mutex mutex;  // the store's as well; guards what follows
  std::int64_t used = 0;
  std::list<std::condition_variable> waiting;  // builders, first come first; the first one tries
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

  // Under the budget's mutex: charges `bytes`, of which `inherited` were taken over from others.
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
