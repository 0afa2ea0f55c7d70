// SPDX-License-Identifier: Apache-2.0
#include <toppings/loader.h>

#include <algorithm>

#include "testing.h"

namespace toppings {
namespace {

using testing::add_image;
using testing::small_shape;

constexpr std::byte kPoison{0xA5};

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
  SlotTable table_{shape_, arena_, 4};
};

TEST_F(LoaderTest, BringsExactlyTheBytesOfTheImage) {
  const auto first = image({{3, 2}, {}, {1}}, "first");
  const auto second = image({{0, 5}, {}, {4}}, "second");
  for (const auto& adapter : {first, second}) load(table_, table_.acquire(adapter).slot);

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
  load(table_, slot);
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
  load(table_, slot);
  EXPECT_EQ(table_.layer_data(slot, 0)[0], kPoison);
  EXPECT_NE(table_.layer_data(slot, 2)[0], kPoison);
  load(table_, slot);
}

TEST_F(LoaderTest, NeedsAPinnedSlot) {
  TOPPINGS_EXPECT_ERROR(load(table_, 0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(load(table_, 4), invalid_argument);
  const int slot = table_.acquire(image({{3, 2}, {}, {1}}, "a")).slot;
  table_.release(slot);
  TOPPINGS_EXPECT_ERROR(load(table_, slot), invalid_argument);
  EXPECT_EQ(arena_->layer(0)[0], kPoison);
}

}  // namespace
}  // namespace toppings
