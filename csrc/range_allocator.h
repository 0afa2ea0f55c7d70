// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace toppings {

// Hands out exact-size ranges of [0, size) by first fit; a freed range melts into its free
// neighbours. Every call goes through the ranges once: there are at most two for each adapter in an
// arena, kept in one sorted vector, so this takes microseconds for thousands of them. Not
// thread-safe.
class RangeAllocator {
 public:
  static constexpr std::int64_t kGranule = 64;
  static constexpr int kFree = -1;

  // The ranges cover [0, size) without gaps, in address order; no two free ones are adjacent.
  struct Range {
    std::int64_t offset;
    std::int64_t bytes;  // a multiple of kGranule, > 0
    int owner;           // kFree, or what allocate() was told

    bool operator==(const Range&) const = default;
  };

  // size is rounded down to kGranule. With at most max_ranges ranges in use, no call allocates
  // memory later on. Throws invalid_argument for a size below one granule.
  RangeAllocator(std::int64_t size, int max_ranges);

  std::int64_t size() const noexcept { return size_; }
  std::int64_t used() const noexcept { return used_; }
  std::span<const Range> ranges() const noexcept { return ranges_; }
  std::int64_t largest_free() const noexcept;

  // What a request for `bytes` (> 0, <= size) takes.
  static std::int64_t rounded(std::int64_t bytes) noexcept {
    return (bytes + kGranule - 1) / kGranule * kGranule;
  }

  // The offset of the range, or nothing when no free range is large enough. owner: >= 0.
  std::optional<std::int64_t> allocate(std::int64_t bytes, int owner);

  // Throws invalid_argument when no range in use starts there.
  void free(std::int64_t offset);

 private:
  std::int64_t size_;
  std::int64_t used_ = 0;
  std::vector<Range> ranges_;
};

}  // namespace toppings
