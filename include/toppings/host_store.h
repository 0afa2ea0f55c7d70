// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>
#include <toppings/export.h>
#include <toppings/image.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace toppings {

// Images under a byte budget. An image is in use while anyone but the store holds a shared_ptr to
// it; idle images are evicted least recently used first, images in use never. Identity is the
// digest, so two versions of one name live side by side. Thread-safe.
class TOPPINGS_EXPORT HostStore {
 public:
  struct Stats {
    std::int64_t budget_bytes;
    std::int64_t used_bytes;  // images in the store or still held by someone, and builders
    std::int64_t images;      // in the store
    std::int64_t evictions;   // since the store was made
    std::int64_t waiting;     // calls of build() that wait for room
  };

  // Memory comes from device.allocate_host, or for a device that is_in_place() from one range of
  // addresses. is_shared: from such a range in any case, of a file that other processes can map.
  // Throws invalid_argument for a budget < 1, out_of_memory when the addresses can't be reserved.
  HostStore(std::shared_ptr<Device> device, std::int64_t budget_bytes, bool is_shared = false);
  ~HostStore();
  HostStore(const HostStore&) = delete;
  HostStore& operator=(const HostStore&) = delete;

  // Reserves layout.bytes(), evicting idle images when they don't fit otherwise: none when even all
  // of them would not do, and none that could stay. digest: any non-empty string. While images in
  // use and builders leave too little room it waits as long as `patience`, first come first served:
  // while others wait, nobody gets room before them. A waiting call looks at *cancel every few
  // milliseconds; it may be null. Throws store_full when there is still no room, cancelled,
  // invalid_argument when the whole budget would be too small, out_of_memory.
  ImageBuilder build(AdapterLayout layout, std::string digest,
                     std::chrono::nanoseconds patience = std::chrono::nanoseconds::zero(),
                     const std::atomic<bool>* cancel = nullptr);

  // The finished image, now findable by its digest. When an image of this digest is there already,
  // that one is returned and the new one dropped. Counts as a use. Throws invalid_argument for a
  // builder of another store, an empty one, one that lacks a block (which it keeps open), or one
  // whose digest is there already in another dtype or shape.
  std::shared_ptr<const Image> insert(ImageBuilder&& builder);

  // nullptr when absent. Counts as a use.
  std::shared_ptr<const Image> find(const std::string& digest);

  // Forgets an image; whoever holds it keeps it, and its bytes count until it is gone. False when
  // absent.
  bool erase(const std::string& digest);

  const std::shared_ptr<Device>& device() const noexcept;

  // Where all images lie, when the device is_in_place() or the store is shared: one range of
  // addresses, larger than the budget, of which only the images' own pages are memory. Empty
  // otherwise.
  std::span<const std::byte> region() const noexcept;

  // The descriptor of a shared store's file, whose bytes are the region's; -1: it isn't shared. To
  // other processes of this user it is /proc/PID/fd/N, as long as the store lives.
  int region_file() const noexcept;

  Stats stats() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace toppings
