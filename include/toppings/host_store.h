// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>
#include <toppings/export.h>
#include <toppings/image.h>

#include <cstdint>
#include <memory>
#include <string>

namespace toppings {

// Images under a byte budget. An image is in use while anyone but the store holds a shared_ptr to
// it (hold no weak_ptr: locking one can race with an eviction, and its bytes would not be counted
// then); idle images are evicted least recently used first, images in use never. Identity is the
// digest, so two versions of one name live side by side. Thread-safe.
class TOPPINGS_EXPORT HostStore {
 public:
  struct Stats {
    std::int64_t budget_bytes;
    std::int64_t used_bytes;  // images in the store or still held by someone, and builders
    std::int64_t images;      // in the store
    std::int64_t evictions;   // since the store was made
  };

  // Memory comes from device.allocate_host. Throws invalid_argument for a budget < 1.
  HostStore(std::shared_ptr<Device> device, std::int64_t budget_bytes);
  ~HostStore();
  HostStore(const HostStore&) = delete;
  HostStore& operator=(const HostStore&) = delete;

  // Reserves layout.bytes(), evicting idle images when they don't fit otherwise: none when even all
  // of them would not do, and none that could stay. digest: any non-empty string. Throws store_full
  // when images in use and builders leave too little room, invalid_argument when the whole budget
  // would be too small, out_of_memory.
  ImageBuilder build(AdapterLayout layout, std::string digest);

  // The finished image, now findable by its digest. When an image of this digest is there already,
  // that one is returned and the new one dropped. Counts as a use. Throws invalid_argument for a
  // builder of another store, an empty one, or one that lacks a block (which it keeps open).
  std::shared_ptr<const Image> insert(ImageBuilder&& builder);

  // nullptr when absent. Counts as a use.
  std::shared_ptr<const Image> find(const std::string& digest);

  // Forgets an image; whoever holds it keeps it, and its bytes count until it is gone. False when
  // absent.
  bool erase(const std::string& digest);

  Stats stats() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace toppings
