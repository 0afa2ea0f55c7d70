// SPDX-License-Identifier: Apache-2.0
#include "range_allocator.h"

#include <algorithm>
#include <iterator>

#include "check.h"

namespace toppings {

RangeAllocator::RangeAllocator(std::int64_t size, int max_ranges)
    : size_(size / kGranule * kGranule) {
  check_positive("size in granules", size_);
  ranges_.reserve(2 * static_cast<std::size_t>(max_ranges) + 1);
  ranges_.push_back({.offset = 0, .bytes = size_, .owner = kFree});
}

std::int64_t RangeAllocator::largest_free() const noexcept {
  std::int64_t largest = 0;
  for (const Range& range : ranges_) {
    if (range.owner == kFree) largest = std::max(largest, range.bytes);
  }
  return largest;
}

std::optional<std::int64_t> RangeAllocator::allocate(std::int64_t bytes, int owner) {
  check_positive("bytes", bytes);
  if (bytes > size_) return std::nullopt;
  const std::int64_t need = rounded(bytes);
  const auto range = std::ranges::find_if(ranges_, [need](const Range& candidate) {
    return candidate.owner == kFree && candidate.bytes >= need;
  });
  if (range == ranges_.end()) return std::nullopt;
  const Range rest{.offset = range->offset + need, .bytes = range->bytes - need, .owner = kFree};
  const std::int64_t offset = range->offset;
  *range = {.offset = offset, .bytes = need, .owner = owner};
  if (rest.bytes > 0) ranges_.insert(std::next(range), rest);
  used_ += need;
  return offset;
}

void RangeAllocator::free(std::int64_t offset) {
  auto range = std::ranges::lower_bound(ranges_, offset, {}, &Range::offset);
  if (range == ranges_.end() || range->offset != offset || range->owner == kFree) {
    fail(Status::invalid_argument, "offset", "the start of a range in use", std::to_string(offset));
  }
  used_ -= range->bytes;
  range->owner = kFree;
  const auto next = std::next(range);
  if (next != ranges_.end() && next->owner == kFree) {
    range->bytes += next->bytes;
    ranges_.erase(next);
  }
  if (range == ranges_.begin()) return;
  const auto previous = std::prev(range);
  if (previous->owner == kFree) {
    previous->bytes += range->bytes;
    ranges_.erase(range);
  }
}

}  // namespace toppings
