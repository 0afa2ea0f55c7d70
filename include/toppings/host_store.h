// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include <toppings/device.h>
#include <toppings/export.h>
#include <toppings/image.h>

namespace toppings {

// Images under a byte budget. An image is in use while anyone but the store holds it; idle images are evicted least
// recently used first, images in use never. Identity is the digest, so two versions of one name live side by side.
// Thread-safe.
class TOPPINGS_EXPORT HostStore {
 public:
  struct Stats {
    std::int64_t budget_bytes;
    std::int64_t used_bytes;    // images in the store or still held by someone, and builders under way
    std::int64_t images;        // in the store
    std::int64_t evictions;     // since the store was made
  };

  // Memory comes from device.allocate_host. Throws invalid_argument for a budget < 1.
  HostStore(std::shared_ptr<Device> device, std::int64_t budget_bytes);
  ~HostStore();
  HostStore(const HostStore&) = delete;
  HostStore& operator=(const HostStore&) = delete;

  // Reserves layout.bytes(), evicting idle images when they don't fit otherwise (never more than needed, none when even
  // all of them would not do). Throws store_full. digest: any non-empty string.
  ImageBuilder build(AdapterLayout layout, std::string digest);

  // The finished image, now findable by its digest. When an image of this digest is there already, that one is returned
  // and the new one dropped.
  std::shared_ptr<const Image> insert(ImageBuilder&& builder);

  // nullptr when absent. Counts as a use.
  std::shared_ptr<const Image> find(const std::string& digest);

  // Forgets an image; whoever holds it keeps it, and its bytes count until it is gone. False when absent.
  bool erase(const std::string& digest);

  Stats stats() const;

 private:
  class Impl;
  std::shared_ptr<Impl> impl_;
};

}  // namespace toppings
