// SPDX-License-Identifier: Apache-2.0
#include "range_allocator.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>

#include "slots/eviction.h"
#include "testing.h"

namespace toppings {
namespace {

constexpr std::int64_t kGranule = RangeAllocator::kGranule;
using Range = RangeAllocator::Range;

TEST(RangeAllocator, RoundsToGranules) {
  RangeAllocator allocator(10 * kGranule + 5, 10);
  EXPECT_EQ(allocator.size(), 10 * kGranule);
  EXPECT_EQ(allocator.allocate(1, 0), 0);
  EXPECT_EQ(allocator.allocate(kGranule + 1, 1), kGranule);
  EXPECT_EQ(allocator.used(), 3 * kGranule);
  EXPECT_EQ(allocator.largest_free(), 7 * kGranule);
}

TEST(RangeAllocator, TakesTheFirstHoleThatFits) {
  RangeAllocator allocator(10 * kGranule, 10);
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(allocator.allocate(2 * kGranule, i));
  EXPECT_FALSE(allocator.allocate(1, 9));
  allocator.free(2 * kGranule);
  allocator.free(6 * kGranule);
  EXPECT_EQ(allocator.allocate(kGranule, 5), 2 * kGranule);
  EXPECT_EQ(allocator.allocate(2 * kGranule, 6), 6 * kGranule);
}

TEST(RangeAllocator, MeltsFreeNeighbours) {
  RangeAllocator allocator(6 * kGranule, 3);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(allocator.allocate(2 * kGranule, i));
  allocator.free(0);
  allocator.free(4 * kGranule);
  EXPECT_EQ(allocator.largest_free(), 2 * kGranule);
  allocator.free(2 * kGranule);
  ASSERT_EQ(allocator.ranges().size(), 1U);
  EXPECT_EQ(allocator.largest_free(), 6 * kGranule);
  EXPECT_EQ(allocator.used(), 0);
}

TEST(RangeAllocator, RefusesNonsense) {
  TOPPINGS_EXPECT_ERROR(RangeAllocator(kGranule - 1, 1), invalid_argument);
  RangeAllocator allocator(4 * kGranule, 2);
  TOPPINGS_EXPECT_ERROR(allocator.allocate(0, 0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(allocator.free(0), invalid_argument);
  ASSERT_TRUE(allocator.allocate(2 * kGranule, 0));
  TOPPINGS_EXPECT_ERROR(allocator.free(kGranule), invalid_argument);
  allocator.free(0);
  TOPPINGS_EXPECT_ERROR(allocator.free(0), invalid_argument);
  EXPECT_FALSE(allocator.allocate(std::numeric_limits<std::int64_t>::max(), 0));
}

// The naive model: one owner per granule.
class Granules {
 public:
  explicit Granules(std::size_t count) : owners_(count, RangeAllocator::kFree) {}

  std::optional<std::int64_t> allocate(std::int64_t bytes, int owner) {
    const auto count = static_cast<std::size_t>((bytes + kGranule - 1) / kGranule);
    for (std::size_t first = 0; first + count <= owners_.size(); ++first) {
      const auto begin = owners_.begin() + static_cast<std::ptrdiff_t>(first);
      const auto end = begin + static_cast<std::ptrdiff_t>(count);
      if (std::any_of(begin, end, [](int o) { return o != RangeAllocator::kFree; })) continue;
      std::fill(begin, end, owner);
      return static_cast<std::int64_t>(first) * kGranule;
    }
    return std::nullopt;
  }

  void free(int owner) { std::ranges::replace(owners_, owner, RangeAllocator::kFree); }

  std::vector<Range> ranges() const {
    std::vector<Range> ranges;
    for (std::size_t i = 0; i < owners_.size(); ++i) {
      if (ranges.empty() || ranges.back().owner != owners_[i]) {
        ranges.push_back({static_cast<std::int64_t>(i) * kGranule, 0, owners_[i]});
      }
      ranges.back().bytes += kGranule;
    }
    return ranges;
  }

 private:
  std::vector<int> owners_;
};

TEST(RangeAllocator, AgreesWithANaiveModel) {
  constexpr std::size_t kGranules = 96;
  std::mt19937_64 random(7);
  RangeAllocator allocator(kGranules * kGranule, kGranules);
  Granules naive(kGranules);
  std::map<int, std::int64_t> live;
  for (int step = 0; step < 10'000; ++step) {
    // Fills up for a while, then drains, so that both extremes are visited.
    const bool fill = (step / 200) % 2 == 0;
    if (random() % 10 < (fill ? 7 : 3)) {
      const auto bytes = static_cast<std::int64_t>(random() % (12 * kGranule)) + 1;
      const auto offset = allocator.allocate(bytes, step);
      ASSERT_EQ(offset, naive.allocate(bytes, step)) << "step " << step;
      if (offset) live[step] = *offset;
    } else if (!live.empty()) {
      const auto victim =
          std::next(live.begin(), static_cast<std::ptrdiff_t>(random() % live.size()));
      allocator.free(victim->second);
      naive.free(victim->first);
      live.erase(victim);
    }
    const std::vector<Range> expected = naive.ranges();
    ASSERT_TRUE(std::ranges::equal(allocator.ranges(), expected)) << "step " << step;
    std::int64_t used = 0;
    std::int64_t largest = 0;
    for (const Range& range : expected) {
      if (range.owner == RangeAllocator::kFree) {
        largest = std::max(largest, range.bytes);
      } else {
        used += range.bytes;
      }
    }
    ASSERT_EQ(allocator.used(), used);
    ASSERT_EQ(allocator.largest_free(), largest);
  }
}

TEST(Eviction, AgreesWithTryingEveryWindow) {
  constexpr double kStays = std::numeric_limits<double>::infinity();
  std::mt19937_64 random(11);
  for (int round = 0; round < 5'000; ++round) {
    std::vector<Range> ranges;
    std::vector<double> costs;
    std::int64_t offset = 0;
    const std::size_t count = 1 + random() % 10;
    for (std::size_t i = 0; i < count; ++i) {
      const auto bytes = static_cast<std::int64_t>(1 + random() % 5) * kGranule;
      const bool is_free = (i == 0 || costs.back() != 0) && random() % 3 == 0;
      ranges.push_back({offset, bytes, is_free ? RangeAllocator::kFree : static_cast<int>(i)});
      costs.push_back(is_free ? 0 : random() % 4 == 0 ? kStays : 1.0 + double(random() % 6));
      offset += bytes;
    }
    const auto cost = [&](const Range& range) {
      return costs[static_cast<std::size_t>(&range - ranges.data())];
    };
    const auto need = static_cast<std::int64_t>(1 + random() % 14) * kGranule;
    double cheapest = kStays;
    std::size_t expected_first = 0;
    std::size_t expected_last = 0;
    for (std::size_t last = 0; last < count; ++last) {
      std::int64_t bytes = 0;
      double sum = 0;
      for (std::size_t first = last + 1; first-- > 0;) {
        bytes += ranges[first].bytes;
        sum += costs[first];
        if (bytes < need || sum >= cheapest) continue;
        cheapest = sum;
        expected_first = first;
        expected_last = last;
      }
    }
    const Ranges window = cheapest_window(ranges, need, cost);
    ASSERT_EQ(window.empty(), std::isinf(cheapest)) << "round " << round;
    if (window.empty()) continue;
    ASSERT_EQ(window.data(), &ranges[expected_first]) << "round " << round;
    ASSERT_EQ(&window.back(), &ranges[expected_last]) << "round " << round;
  }
}

}  // namespace
}  // namespace toppings
