// SPDX-License-Identifier: Apache-2.0
#include <toppings/loader.h>
#include <toppings/slot_table.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <map>
#include <optional>
#include <thread>

#include "testing.h"

namespace toppings {
namespace {

using testing::add_image;
using testing::layout_of_bytes;
using testing::small_shape;

// One layer, so that a slot's bytes are the image's. Images of 64-byte granules.
class SlotTableTest : public ::testing::Test {
 protected:
  static constexpr std::int64_t kGranule = 64;

  SlotTable make(std::int64_t granules, int num_slots) {
    return SlotTable(layout_of_bytes(64).shape(),
                     std::make_shared<Arena>(host_device(), 1, granules * kGranule, DType::f32),
                     num_slots);
  }

  std::shared_ptr<const Image> image(const std::string& digest, std::int64_t granules) {
    return add_image(store_, layout_of_bytes(granules * kGranule), digest);
  }

  HostStore store_{host_device(), 1 << 20};
};

TEST_F(SlotTableTest, KeepsAnAdapterInItsSlot) {
  SlotTable table = make(8, 2);
  const auto a = image("a", 3);
  const auto first = table.acquire(a);
  EXPECT_FALSE(first.resident);
  EXPECT_EQ(table.find("a"), first.slot);
  EXPECT_EQ(table.image(first.slot), a);
  table.publish(first.slot, 0);
  const auto second = table.acquire(a);
  EXPECT_EQ(second.slot, first.slot);
  EXPECT_TRUE(second.resident);
  EXPECT_EQ(table.stats().pinned, 1);
  table.release(first.slot);
  table.release(first.slot);
  TOPPINGS_EXPECT_ERROR(table.release(first.slot), invalid_argument);
  EXPECT_TRUE(table.acquire(a).resident);
  const auto stats = table.stats();
  EXPECT_EQ(stats.slots, 2);
  EXPECT_EQ(stats.resident, 1);
  EXPECT_EQ(stats.arena_bytes, 8 * kGranule);
  EXPECT_EQ(stats.used_bytes, 3 * kGranule);
  EXPECT_EQ(stats.evictions, 0);
}

TEST_F(SlotTableTest, EvictsTheLeastRecentlyUsedOfEquals) {
  SlotTable table = make(3, 8);
  for (const char* digest : {"a", "b", "c"}) table.release(table.acquire(image(digest, 1)).slot);
  table.release(table.acquire(store_.find("a")).slot);
  table.acquire(image("d", 1));
  EXPECT_EQ(table.find("b"), -1);
  EXPECT_NE(table.find("a"), -1);
  EXPECT_NE(table.find("c"), -1);
  EXPECT_EQ(table.stats().evictions, 1);
}

TEST_F(SlotTableTest, EvictsTheCheapestWindow) {
  SlotTable table = make(8, 8);
  // In address order: large (4), small (1), pinned (1), two (2).
  for (const auto& [digest, granules] : std::vector<std::pair<std::string, int>>{
           {"large", 4}, {"small", 1}, {"pinned", 1}, {"two", 2}}) {
    table.acquire(image(digest, granules));
  }
  for (const char* digest : {"two", "small", "large"}) table.release(table.find(digest));
  EXPECT_TRUE(table.can_acquire(*image("new", 2)));
  table.acquire(store_.find("new"));  // "two" costs 2/2, "large" 4/1
  EXPECT_EQ(table.find("two"), -1);
  EXPECT_NE(table.find("small"), -1);
  table.acquire(image("new5", 5));  // only large + small are adjacent
  EXPECT_EQ(table.find("large"), -1);
  EXPECT_EQ(table.find("small"), -1);
  EXPECT_EQ(table.stats().evictions, 3);
}

TEST_F(SlotTableTest, EvictsForAnIndexToo) {
  SlotTable table = make(100, 2);
  table.release(table.acquire(image("large", 9)).slot);
  table.release(table.acquire(image("small", 1)).slot);
  table.acquire(image("new", 1));
  EXPECT_EQ(table.find("small"), -1);
  EXPECT_NE(table.find("large"), -1);
}

TEST_F(SlotTableTest, ChangesNothingWhenBusy) {
  SlotTable table = make(6, 3);
  for (const char* digest : {"a", "b", "c"}) table.acquire(image(digest, 2));
  table.release(table.find("a"));
  table.release(table.find("c"));
  const auto large = image("large", 3);
  EXPECT_FALSE(table.can_acquire(*large));
  TOPPINGS_EXPECT_ERROR(table.acquire(large), slots_busy);
  EXPECT_EQ(table.stats().resident, 3);
  EXPECT_EQ(table.stats().evictions, 0);
  EXPECT_EQ(table.find("large"), -1);
  EXPECT_EQ(large.use_count(), 1);
  table.release(table.find("b"));
  EXPECT_EQ(table.acquire(large).slot, 0);
}

// Digests come from outside, so two adapters may claim one.
TEST_F(SlotTableTest, AnotherLayoutIsAnotherAdapter) {
  HostStore others(host_device(), 1 << 20);
  SlotTable table = make(8, 3);
  const auto small = image("a", 2);
  const auto large = add_image(others, layout_of_bytes(4 * kGranule), "a");
  const int slot = table.acquire(small).slot;
  const int neighbour = table.acquire(image("b", 2)).slot;
  EXPECT_FALSE(table.can_acquire(*large));
  TOPPINGS_EXPECT_ERROR(table.acquire(large), invalid_argument);
  table.release(slot);  // idle and not loaded
  EXPECT_TRUE(table.can_acquire(*large));
  const SlotTable::Acquired acquired = table.acquire(large);
  EXPECT_FALSE(acquired.resident);
  EXPECT_EQ(table.image(acquired.slot), large);
  EXPECT_EQ(table.stats().evictions, 1);
  EXPECT_EQ(table.stats().used_bytes, 6 * kGranule);
  const std::byte* place = table.layer_data(acquired.slot, 0);
  const std::byte* other = table.layer_data(neighbour, 0);
  EXPECT_TRUE(place + 4 * kGranule <= other || other + 2 * kGranule <= place);
}

TEST_F(SlotTableTest, HoldsTheImageWhilePinned) {
  SlotTable table = make(2, 2);
  auto a = image("a", 2);
  const int slot = table.acquire(a).slot;
  EXPECT_EQ(a.use_count(), 2);
  table.publish(slot, 0);
  table.release(slot);
  EXPECT_EQ(a.use_count(), 1);
  TOPPINGS_EXPECT_ERROR(table.image(slot), invalid_argument);
  EXPECT_TRUE(table.is_published(slot, 0));
  EXPECT_TRUE(table.acquire(a).resident);
  EXPECT_EQ(table.image(slot), a);
}

TEST_F(SlotTableTest, RefusesWhatNeverFits) {
  SlotTable table = make(4, 2);
  TOPPINGS_EXPECT_ERROR(table.acquire(image("large", 5)), invalid_argument);
  TOPPINGS_EXPECT_ERROR(table.can_acquire(*store_.find("large")), invalid_argument);
  TOPPINGS_EXPECT_ERROR(table.acquire(nullptr), invalid_argument);
  const auto other_model =
      add_image(store_, AdapterLayout(small_shape(), DType::f32, {{1, 0}, {}, {0}}), "other");
  TOPPINGS_EXPECT_ERROR(table.acquire(other_model), mismatch);
  const auto other_dtype =
      add_image(store_, AdapterLayout(layout_of_bytes(64).shape(), DType::f16, {{1}}), "f16");
  TOPPINGS_EXPECT_ERROR(table.acquire(other_dtype), mismatch);
  const auto equal_model =
      std::make_shared<const ModelShape>(std::vector<std::vector<Projection>>{{{"p", 1, 1}}});
  table.acquire(add_image(store_, AdapterLayout(equal_model, DType::f32, {{1}}), "equal"));
}

TEST_F(SlotTableTest, RefusesNonsense) {
  const auto shape = small_shape();
  const auto arena = std::make_shared<Arena>(host_device(), 3, 64, DType::f32);
  TOPPINGS_EXPECT_ERROR(SlotTable(shape, arena, 0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(SlotTable(nullptr, arena, 1), invalid_argument);
  TOPPINGS_EXPECT_ERROR(SlotTable(shape, nullptr, 1), invalid_argument);
  TOPPINGS_EXPECT_ERROR(SlotTable(layout_of_bytes(64).shape(), arena, 1), invalid_argument);
  SlotTable table = make(4, 2);
  TOPPINGS_EXPECT_ERROR(table.release(-1), invalid_argument);
  TOPPINGS_EXPECT_ERROR(table.release(0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(table.image(0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(table.layer_data(2, 0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(table.publish(0, 0), invalid_argument);
  const int slot = table.acquire(image("a", 1)).slot;
  TOPPINGS_EXPECT_ERROR(table.publish(slot, 1), invalid_argument);
  TOPPINGS_EXPECT_ERROR(table.is_published(slot, -1), invalid_argument);
  table.release(slot);
  TOPPINGS_EXPECT_ERROR(table.layer_data(slot, 0), invalid_argument);
}

// What the table should be, with an owner per granule and every window tried.
class Naive {
 public:
  struct Entry {
    std::shared_ptr<const Image> image;
    std::int64_t offset = 0;
    int pins = 0;
    std::uint64_t last_use = 0;
    std::vector<bool> published = {};
  };

  Naive(std::size_t granules, std::size_t slots) : owners_(granules, -1), entries_(slots) {}

  const std::vector<Entry>& entries() const { return entries_; }
  Entry& entry(int slot) { return entries_[static_cast<std::size_t>(slot)]; }

  int find(const std::string& digest) const {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (entries_[i].image != nullptr && entries_[i].image->digest() == digest) {
        return static_cast<int>(i);
      }
    }
    return -1;
  }

  std::int64_t used_bytes() const {
    return 64 * std::ranges::count_if(owners_, [](int owner) { return owner != -1; });
  }

  // The slot, or -1 when everything is busy.
  int acquire(const std::shared_ptr<const Image>& image, int num_layers) {
    int slot = find(image->digest());
    if (slot < 0) {
      const auto need = static_cast<std::size_t>(image->layout().max_layer_bytes() / 64);
      if (!make_room(need)) return -1;
      slot = free_index();
      const std::size_t at = *first_fit(need);
      std::fill_n(owners_.begin() + static_cast<std::ptrdiff_t>(at), need, slot);
      entry(slot) = {.image = image,
                     .offset = 64 * static_cast<std::int64_t>(at),
                     .published = std::vector<bool>(static_cast<std::size_t>(num_layers))};
    }
    ++entry(slot).pins;
    entry(slot).last_use = ++clock_;
    return slot;
  }

  void release(int slot) {
    --entry(slot).pins;
    entry(slot).last_use = ++clock_;
  }

 private:
  int free_index() const {
    for (std::size_t i = 0; i < entries_.size(); ++i) {
      if (entries_[i].image == nullptr) return static_cast<int>(i);
    }
    return -1;
  }

  std::optional<std::size_t> first_fit(std::size_t need) const {
    for (std::size_t first = 0; first + need <= owners_.size(); ++first) {
      const auto begin = owners_.begin() + static_cast<std::ptrdiff_t>(first);
      if (std::all_of(begin, begin + static_cast<std::ptrdiff_t>(need),
                      [](int owner) { return owner == -1; })) {
        return first;
      }
    }
    return std::nullopt;
  }

  double cost(int owner) {
    if (owner == -1) return 0;
    if (entry(owner).pins > 0) return std::numeric_limits<double>::infinity();
    return static_cast<double>(entry(owner).image->layout().bytes()) /
           static_cast<double>(std::max<std::uint64_t>(clock_ - entry(owner).last_use, 1));
  }

  // Runs of granules of one owner, as (owner, count).
  std::vector<std::pair<int, std::size_t>> runs() const {
    std::vector<std::pair<int, std::size_t>> runs;
    for (const int owner : owners_) {
      if (runs.empty() || runs.back().first != owner) runs.emplace_back(owner, 0);
      ++runs.back().second;
    }
    return runs;
  }

  bool make_room(std::size_t need) {
    const bool room = first_fit(need).has_value();
    if (room && free_index() >= 0) return true;
    const auto runs = this->runs();
    double best = std::numeric_limits<double>::infinity();
    std::vector<int> victims;
    for (std::size_t last = 0; last < runs.size(); ++last) {
      for (std::size_t first = last + 1; first-- > 0;) {
        if (room && (first != last || runs[last].first == -1)) continue;
        double sum = 0;
        std::size_t granules = 0;
        std::vector<int> owners;
        for (std::size_t i = first; i <= last; ++i) {
          sum += cost(runs[i].first);
          granules += runs[i].second;
          if (runs[i].first != -1) owners.push_back(runs[i].first);
        }
        if ((room || granules >= need) && sum < best) {
          best = sum;
          victims = owners;
        }
      }
    }
    if (std::isinf(best)) return false;
    for (const int victim : victims) {
      std::ranges::replace(owners_, victim, -1);
      entry(victim) = {};
    }
    return true;
  }

  std::vector<int> owners_;
  std::vector<Entry> entries_;
  std::uint64_t clock_ = 0;
};

class RandomSlotTable : public ::testing::Test {
 protected:
  static constexpr int kGranules = 128;
  static constexpr int kSlots = 6;

  RandomSlotTable() {
    std::mt19937_64 random(1);
    for (int i = 0; i < 30; ++i) {
      // From a few granules to a third of the arena; some adapters lack projections or layers.
      const auto rank = [&] {
        return static_cast<std::int64_t>(random() % 3 == 0 ? 0 : random() % 20);
      };
      const AdapterLayout layout(shape_, DType::bf16, {{rank() + 1, rank()}, {}, {rank()}});
      images_.push_back(
          add_image(store_, layout, std::to_string(i), static_cast<std::uint64_t>(i)));
    }
  }

  void check(const std::string& where) {
    ASSERT_EQ(table_.stats().used_bytes, naive_.used_bytes()) << where;
    for (const auto& image : images_) {
      const int slot = naive_.find(image->digest());
      ASSERT_EQ(table_.find(image->digest()), slot) << where << ", image " << image->digest();
      const bool is_pinned = slot >= 0 && naive_.entry(slot).pins > 0;
      const long holders = 1 + (slot >= 0 ? 1 : 0) + (is_pinned ? 1 : 0);  // test, model, table
      ASSERT_EQ(image.use_count(), holders) << where << ", image " << image->digest();
    }
    for (int slot = 0; slot < kSlots; ++slot) check_rows(slot, where);
  }

  void check_rows(int slot, const std::string& where) {
    const Naive::Entry& entry = naive_.entry(slot);
    for (int layer = 0; layer < shape_->num_layers(); ++layer) {
      const bool published =
          entry.image != nullptr && entry.published[static_cast<std::size_t>(layer)];
      ASSERT_EQ(table_.is_published(slot, layer), published) << where;
      for (int i = 0; i < static_cast<int>(shape_->layer(layer).size()); ++i) {
        const auto cell = static_cast<std::size_t>(shape_->row(layer, i) * kSlots + slot);
        std::int64_t expected[] = {0, 0, 0};
        float scale = 0;
        if (published && entry.image->layout().block(layer, i).rank > 0) {
          const Block& block = entry.image->layout().block(layer, i);
          expected[0] = entry.offset / 2 + block.a_offset;
          expected[1] = entry.offset / 2 + block.b_offset;
          expected[2] = block.rank;
          scale = entry.image->scale(layer, i);
        }
        ASSERT_TRUE(std::ranges::equal(table_.slots().subspan(3 * cell, 3), expected)) << where;
        ASSERT_EQ(table_.scales()[cell], scale) << where;
      }
    }
  }

  std::shared_ptr<const ModelShape> shape_ = small_shape();
  HostStore store_{host_device(), 1 << 22};
  std::vector<std::shared_ptr<const Image>> images_;
  std::shared_ptr<Arena> arena_ =
      std::make_shared<Arena>(host_device(), 3, 64 * kGranules, DType::bf16);
  SlotTable table_{shape_, arena_, kSlots};
  Naive naive_{kGranules, kSlots};
};

TEST_F(RandomSlotTable, AgreesWithANaiveModel) {
  std::mt19937_64 random(5);
  int busy = 0;
  for (int step = 0; step < 5'000; ++step) {
    const std::string where = "step " + std::to_string(step);
    const auto dice = random() % 10;
    if (dice < 5) {
      const auto& image = images_[random() % images_.size()];
      const bool can = table_.can_acquire(*image);
      const int slot = naive_.acquire(image, shape_->num_layers());
      ASSERT_EQ(can, slot >= 0) << where;
      if (slot >= 0) {
        const SlotTable::Acquired acquired = table_.acquire(image);
        ASSERT_EQ(acquired.slot, slot) << where;
        const auto& published = naive_.entry(slot).published;
        ASSERT_EQ(acquired.resident, std::ranges::find(published, false) == published.end());
        for (int layer = 0; layer < shape_->num_layers(); ++layer) {
          ASSERT_EQ(table_.layer_data(slot, layer),
                    arena_->layer(layer) + naive_.entry(slot).offset)
              << where;
        }
      } else {
        TOPPINGS_EXPECT_ERROR(table_.acquire(image), slots_busy);
        ++busy;
      }
    } else {
      const int slot = static_cast<int>(random() % kSlots);
      if (naive_.entry(slot).pins == 0) continue;
      if (dice < 8) {
        naive_.release(slot);
        table_.release(slot);
      } else {
        const int layer = static_cast<int>(random() % 3);
        naive_.entry(slot).published[static_cast<std::size_t>(layer)] = true;
        table_.publish(slot, layer);
      }
    }
    check(where);
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(busy, 50);
  EXPECT_GT(table_.stats().evictions, 200);
}

// Threads acquire, load, read their own bytes and release, in an arena that holds a few at a time.
TEST_F(RandomSlotTable, SurvivesThreads) {
  std::atomic<int> broken = 0;
  std::atomic<int> loads = 0;
  Loader loader(std::shared_ptr<SlotTable>(std::shared_ptr<void>(), &table_));
  const auto work = [&](std::uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int step = 0; step < 1'000; ++step) {
      const auto& image = images_[random() % images_.size()];
      SlotTable::Acquired acquired{};
      try {
        acquired = table_.acquire(image);
      } catch (const Error& error) {
        if (error.status() != Status::slots_busy) ++broken;
        continue;
      }
      if (!acquired.resident) {
        if (!loader.load(acquired.slot).wait_for_all(std::chrono::seconds(20))) ++broken;
        ++loads;
      }
      const std::byte* data = table_.layer_data(acquired.slot, 0);
      const auto bytes = static_cast<std::size_t>(image->layout().layer_bytes(0));
      if (std::memcmp(data, image->layer_data(0), bytes) != 0) ++broken;
      table_.release(acquired.slot);
    }
  };
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 1; seed <= 3; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(broken, 0);
  EXPECT_GT(loads, 100);
  EXPECT_EQ(table_.stats().pinned, 0);
}

}  // namespace
}  // namespace toppings
