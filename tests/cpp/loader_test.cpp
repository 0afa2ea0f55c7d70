// SPDX-License-Identifier: Apache-2.0
#include <toppings/loader.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>

#include "testing.h"

namespace toppings {
namespace {

using testing::add_image;
using testing::small_shape;

constexpr std::byte kPoison{0xA5};
constexpr std::chrono::seconds kPatience{20};

class LoaderTest : public ::testing::Test {
 protected:
  static constexpr std::int64_t kLayerBytes = 8192;

  LoaderTest() {
    for (int layer = 0; layer < arena_->num_layers(); ++layer) {
      std::memset(arena_->layer(layer), static_cast<int>(kPoison), kLayerBytes);
    }
  }

  std::shared_ptr<const Image> image(const testing::Ranks& ranks, const std::string& digest) {
    return add_image(store_, AdapterLayout(shape_, DType::bf16, ranks), digest,
                     std::hash<std::string>{}(digest));
  }

  // The first of A's elements and the rank that the tables give for a row of a slot.
  std::int64_t cell(int row, int slot, int column) const {
    return table_.slots()[static_cast<std::size_t>((row * table_.num_slots() + slot) * 3 + column)];
  }

  std::shared_ptr<const ModelShape> shape_ = small_shape();
  HostStore store_{host_device(), 1 << 20};
  std::shared_ptr<Arena> arena_ =
      std::make_shared<Arena>(host_device(), 3, kLayerBytes, DType::bf16);
  std::shared_ptr<SlotTable> shared_table_ = std::make_shared<SlotTable>(shape_, arena_, 4);
  SlotTable& table_ = *shared_table_;
  Loader loader_{shared_table_};

  void load(int slot) { EXPECT_TRUE(loader_.load(slot).wait_for_all(kPatience)); }
};

TEST_F(LoaderTest, BringsExactlyTheBytesOfTheImage) {
  const auto first = image({{3, 2}, {}, {1}}, "first");
  const auto second = image({{0, 5}, {}, {4}}, "second");
  for (const auto& adapter : {first, second}) load(table_.acquire(adapter).slot);

  std::vector<std::vector<std::byte>> expected(3, std::vector<std::byte>(kLayerBytes, kPoison));
  for (const auto& adapter : {first, second}) {
    const int slot = table_.find(adapter->digest());
    for (int layer = 0; layer < 3; ++layer) {
      const std::ptrdiff_t offset = table_.layer_data(slot, layer) - arena_->layer(layer);
      std::copy_n(adapter->layer_data(layer), adapter->layout().layer_bytes(layer),
                  expected[static_cast<std::size_t>(layer)].begin() + offset);
    }
  }
  for (int layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(std::memcmp(arena_->layer(layer), expected[static_cast<std::size_t>(layer)].data(),
                          kLayerBytes),
              0)
        << "layer " << layer;
  }
}

TEST_F(LoaderTest, PublishesWhatTheOperatorsRead) {
  const auto adapter = image({{3, 0}, {}, {1}}, "a");
  const auto other = image({{8, 8}, {}, {8}}, "b");
  table_.acquire(other);
  const int slot = table_.acquire(adapter).slot;
  for (int row = 0; row < 3; ++row) EXPECT_EQ(cell(row, slot, 2), 0);
  load(slot);
  const std::int64_t ranks[] = {3, 0, 1};
  const int layers[] = {0, 0, 2};
  const int projections[] = {0, 1, 0};
  for (int row = 0; row < 3; ++row) {
    EXPECT_EQ(cell(row, slot, 2), ranks[row]);
    const auto scale = table_.scales()[static_cast<std::size_t>(row * 4 + slot)];
    EXPECT_EQ(scale, adapter->scale(layers[row], projections[row]));
    if (ranks[row] == 0) continue;
    const Block& block = adapter->layout().block(layers[row], projections[row]);
    const std::byte* arena = arena_->layer(layers[row]);
    const std::byte* source = adapter->layer_data(layers[row]);
    const Projection& projection =
        shape_->layer(layers[row])[static_cast<std::size_t>(projections[row])];
    EXPECT_EQ(std::memcmp(arena + 2 * cell(row, slot, 0), source + 2 * block.a_offset,
                          static_cast<std::size_t>(2 * block.rank * projection.in)),
              0);
    EXPECT_EQ(std::memcmp(arena + 2 * cell(row, slot, 1), source + 2 * block.b_offset,
                          static_cast<std::size_t>(2 * block.rank * projection.out)),
              0);
  }
  EXPECT_TRUE(table_.acquire(adapter).resident);
  EXPECT_FALSE(table_.acquire(other).resident);
}

TEST_F(LoaderTest, LeavesPublishedLayersAlone) {
  const int slot = table_.acquire(image({{3, 2}, {}, {1}}, "a")).slot;
  table_.publish(slot, 0);
  EXPECT_TRUE(table_.is_published(slot, 0));
  EXPECT_FALSE(table_.is_published(slot, 2));
  load(slot);
  EXPECT_EQ(table_.layer_data(slot, 0)[0], kPoison);
  EXPECT_NE(table_.layer_data(slot, 2)[0], kPoison);
  load(slot);
}

TEST_F(LoaderTest, NeedsAPinnedSlot) {
  TOPPINGS_EXPECT_ERROR(loader_.load(0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(loader_.load(4), invalid_argument);
  const int slot = table_.acquire(image({{3, 2}, {}, {1}}, "a")).slot;
  table_.release(slot);
  TOPPINGS_EXPECT_ERROR(loader_.load(slot), invalid_argument);
  EXPECT_EQ(arena_->layer(0)[0], kPoison);
}

TEST_F(LoaderTest, RefusesNonsense) {
  const int slot = table_.acquire(image({{3, 2}, {}, {1}}, "a")).slot;
  for (const std::vector<int>& order :
       {std::vector<int>{0, 1}, {0, 1, 1}, {0, 1, 3}, {0, 1, -1}, {0, 1, 2, 2}}) {
    TOPPINGS_EXPECT_ERROR(loader_.load(slot, LoadPriority::normal, order), invalid_argument);
  }
  TOPPINGS_EXPECT_ERROR(Loader(nullptr), invalid_argument);
  TOPPINGS_EXPECT_ERROR(Loader(shared_table_, {.num_streams = 0}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(Loader(shared_table_, {.window_seconds = -1}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(Loader(shared_table_, {.cpu = 1 << 20}), invalid_argument);
  Ticket ticket = loader_.load(slot);
  TOPPINGS_EXPECT_ERROR(ticket.has_arrived(3), invalid_argument);
  TOPPINGS_EXPECT_ERROR(ticket.wait_for(-1, kPatience), invalid_argument);
  EXPECT_EQ(table_.stats().pinned, 1);
}

TEST_F(LoaderTest, HoldsAPinOfItsOwn) {
  const auto adapter = image({{3, 2}, {}, {1}}, "a");
  const int slot = table_.acquire(adapter).slot;
  Ticket ticket = loader_.load(slot);
  table_.release(slot);
  EXPECT_TRUE(ticket.wait_for_all(kPatience));
  EXPECT_EQ(ticket.status(), LoadStatus::loaded);
  EXPECT_EQ(ticket.num_arrived(), 3);
  EXPECT_EQ(table_.stats().pinned, 0);
  EXPECT_TRUE(table_.acquire(adapter).resident);
}

TEST_F(LoaderTest, CountsWhatItCopies) {
  const auto adapter = image({{3, 2}, {}, {1}}, "a");
  Ticket ticket = loader_.load(table_.acquire(adapter).slot);
  EXPECT_TRUE(ticket.wait_for_all(kPatience));
  const Loader::Stats stats = loader_.stats();
  EXPECT_EQ(stats.loads, 1);
  EXPECT_EQ(stats.layers, 2);  // one layer holds nothing
  EXPECT_EQ(stats.bytes, adapter->layout().bytes());
  EXPECT_EQ(stats.queued_bytes, 0);
  EXPECT_EQ(stats.cancelled + stats.failed, 0);
  for (int layer = 0; layer < 3; ++layer) {
    const LayerTimes times = ticket.times()[static_cast<std::size_t>(layer)];
    EXPECT_EQ(times.bytes, adapter->layout().layer_bytes(layer));
    EXPECT_EQ(ticket.seconds_until(layer), 0);
    EXPECT_GE(times.transfer, 0);
  }
}

// A link on which the copy of a layer takes long enough to look at it meanwhile.
class SlowLinkTest : public ::testing::Test {
 protected:
  static constexpr int kLayers = 6;
  static constexpr double kLayerSeconds = 0.01;
  static constexpr std::int64_t kRank = 64;

  SlowLinkTest() {
    std::vector<std::vector<Projection>> layers(kLayers, {{"p", 100, 100}});
    shape_ = std::make_shared<const ModelShape>(layers);
    const double bytes = static_cast<double>(layout().layer_bytes(0));
    device_ = host_device(HostLink{.bytes_per_second = bytes / kLayerSeconds});
    store_ = std::make_unique<HostStore>(device_, 1 << 24);
    arena_ = std::make_shared<Arena>(device_, kLayers, 1 << 19, DType::f32);
    table_ = std::make_shared<SlotTable>(shape_, arena_, 8);
    loader_ = std::make_unique<Loader>(table_);
  }

  AdapterLayout layout() const {
    return AdapterLayout(shape_, DType::f32, testing::Ranks(kLayers, {kRank}));
  }

  int acquire(const std::string& digest) {
    return table_->acquire(add_image(*store_, layout(), digest, digest[0])).slot;
  }

  void expect_bytes(int slot) {
    const auto image = table_->image(slot);
    for (int layer = 0; layer < kLayers; ++layer) {
      EXPECT_TRUE(table_->is_published(slot, layer));
      EXPECT_EQ(std::memcmp(table_->layer_data(slot, layer), image->layer_data(layer),
                            static_cast<std::size_t>(image->layout().layer_bytes(layer))),
                0);
    }
  }

  std::shared_ptr<const ModelShape> shape_;
  std::shared_ptr<Device> device_;
  std::unique_ptr<HostStore> store_;
  std::shared_ptr<Arena> arena_;
  std::shared_ptr<SlotTable> table_;
  std::unique_ptr<Loader> loader_;
};

TEST_F(SlowLinkTest, GoesByTheOrder) {
  const int slot = acquire("a");
  const std::vector<int> order{4, 5, 0, 1, 2, 3};
  Ticket ticket = loader_->load(slot, LoadPriority::normal, order);
  for (std::size_t i = 0; i < order.size(); ++i) {
    EXPECT_TRUE(ticket.wait_for(order[i], kPatience));
    for (std::size_t later = i + 2; later < order.size(); ++later) {
      EXPECT_FALSE(ticket.has_arrived(order[later])) << i << " " << later;
    }
  }
  expect_bytes(slot);
}

TEST_F(SlowLinkTest, PublishesALayerWhenItIsThere) {
  const int slot = acquire("a");
  Ticket ticket = loader_->load(slot);
  EXPECT_FALSE(ticket.wait_for(kLayers - 1, std::chrono::milliseconds(1)));
  EXPECT_EQ(ticket.status(), LoadStatus::loading);
  EXPECT_FALSE(table_->is_published(slot, kLayers - 1));
  const auto stream = device_->wrap_stream(nullptr);
  ticket.wait(0, *stream);
  EXPECT_TRUE(table_->is_published(slot, 0));
  EXPECT_TRUE(ticket.wait_for_all(kPatience));
  expect_bytes(slot);
}

TEST_F(SlowLinkTest, EstimatesTheArrival) {
  Ticket first = loader_->load(acquire("a"));
  EXPECT_EQ(first.seconds_until(0), std::numeric_limits<double>::infinity());
  EXPECT_TRUE(first.wait_for_all(kPatience));
  Ticket ticket = loader_->load(acquire("b"));
  EXPECT_NEAR(ticket.seconds_until(kLayers - 1), kLayers * kLayerSeconds, kLayerSeconds * 2);
  EXPECT_TRUE(ticket.wait_for_all(kPatience));
}

TEST_F(SlowLinkTest, LayersInDemandGoFirst) {
  Ticket background = loader_->load(acquire("a"), LoadPriority::urgent);
  Ticket wanted = loader_->load(acquire("b"), LoadPriority::prefetch);
  EXPECT_TRUE(wanted.wait_for_all(kPatience));
  EXPECT_LE(background.num_arrived(), 3);  // at most those that were enqueued before
  EXPECT_TRUE(background.wait_for_all(kPatience));
}

TEST_F(SlowLinkTest, RaisesAPriority) {
  Ticket first = loader_->load(acquire("a"), LoadPriority::normal);
  Ticket second = loader_->load(acquire("b"), LoadPriority::prefetch);
  second.raise(LoadPriority::urgent);
  while (second.num_arrived() < kLayers) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_LE(first.num_arrived(), 4);
  EXPECT_TRUE(first.wait_for_all(kPatience));
}

TEST_F(SlowLinkTest, StopsWhenNobodyWantsIt) {
  const int slot = acquire("a");
  Ticket first = loader_->load(slot);
  Ticket second = loader_->load(slot);
  EXPECT_EQ(loader_->stats().loads, 1);
  first.cancel();
  first.cancel();
  EXPECT_EQ(first.status(), LoadStatus::cancelled);
  EXPECT_EQ(second.status(), LoadStatus::loading);
  TOPPINGS_EXPECT_ERROR(first.wait_for_all(kPatience), cancelled);
  EXPECT_TRUE(second.wait_for(0, kPatience));
  second.cancel();
  TOPPINGS_EXPECT_ERROR(second.wait_for_all(kPatience), cancelled);
  EXPECT_LT(second.num_arrived(), kLayers);
  EXPECT_EQ(loader_->stats().cancelled, 1);

  Ticket again = loader_->load(slot);  // while a copy of the cancelled load may be under way
  EXPECT_TRUE(again.wait_for_all(kPatience));
  expect_bytes(slot);
  EXPECT_EQ(loader_->stats().layers, kLayers);  // none of them twice
  table_->release(slot);
  EXPECT_EQ(table_->stats().pinned, 0);
}

TEST_F(SlowLinkTest, CancelWakesWhoeverWaits) {
  Ticket ticket = loader_->load(acquire("a"));
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    ticket.cancel();
  });
  TOPPINGS_EXPECT_ERROR(ticket.wait_for(kLayers - 1, kPatience), cancelled);
  other.join();
}

TEST_F(SlowLinkTest, TicketsOutliveTheLoader) {
  const int slot = acquire("a");
  Ticket ticket = loader_->load(slot);
  loader_.reset();
  EXPECT_EQ(ticket.status(), LoadStatus::cancelled);
  TOPPINGS_EXPECT_ERROR(ticket.wait_for_all(kPatience), cancelled);
  table_->release(slot);
  EXPECT_EQ(table_->stats().pinned, 0);
}

TEST_F(SlowLinkTest, LoadsShareTheLink) {
  Ticket first = loader_->load(acquire("a"));
  Ticket second = loader_->load(acquire("b"));
  while (first.num_arrived() < kLayers) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  EXPECT_GE(second.num_arrived(), kLayers - 3);
  EXPECT_TRUE(second.wait_for_all(kPatience));
}

}  // namespace
}  // namespace toppings
