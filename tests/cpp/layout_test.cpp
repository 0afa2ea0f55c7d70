// SPDX-License-Identifier: Apache-2.0
#include <toppings/adapter_layout.h>

#include <limits>

#include "testing.h"

namespace toppings {
namespace {

using testing::Ranks;
using testing::small_shape;

TEST(ModelShape, NumbersRowsAcrossLayers) {
  const auto shape = small_shape();
  EXPECT_EQ(shape->num_layers(), 3);
  EXPECT_EQ(shape->num_rows(), 3);
  EXPECT_EQ(shape->row(0, 0), 0);
  EXPECT_EQ(shape->row(0, 1), 1);
  EXPECT_EQ(shape->row(2, 0), 2);
  EXPECT_TRUE(shape->layer(1).empty());
}

TEST(ModelShape, RefusesWhatIsNoModel) {
  using Layers = std::vector<std::vector<Projection>>;
  TOPPINGS_EXPECT_ERROR(ModelShape(Layers{}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(ModelShape(Layers{{{"q", 0, 1}}}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(ModelShape(Layers{{{"q", 1, -1}}}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(ModelShape(Layers{{{"q", 1, std::int64_t{1} << 31}}}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(ModelShape(Layers{{{"", 1, 1}}}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(ModelShape(Layers{{{"q", 1, 1}, {"q", 1, 1}}}), invalid_argument);
  EXPECT_EQ(ModelShape(Layers{{{"q", 1, 1}}, {{"q", 1, 1}}}).num_rows(), 2);
}

TEST(ModelShape, RefusesIndicesOutOfRange) {
  const auto shape = small_shape();
  TOPPINGS_EXPECT_ERROR(shape->layer(-1), invalid_argument);
  TOPPINGS_EXPECT_ERROR(shape->layer(3), invalid_argument);
  TOPPINGS_EXPECT_ERROR(shape->row(1, 0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(shape->row(0, -1), invalid_argument);
}

TEST(ModelShape, EqualsByValue) {
  EXPECT_EQ(*small_shape(), *small_shape());
  EXPECT_FALSE(*small_shape() == ModelShape({{{"q", 24, 40}}}));
}

TEST(AdapterLayout, PlacesBlocksByHand) {
  const AdapterLayout layout(small_shape(), DType::bf16, {{3, 2}, {}, {1}});
  // q: 3 * (24 + 40) * 2 = 384 bytes; k: 2 * (24 + 8) * 2 = 128; o: 1 * (40 + 24) * 2 = 128.
  EXPECT_EQ(layout.block(0, 0).a_offset, 0);
  EXPECT_EQ(layout.block(0, 0).b_offset, 72);
  EXPECT_EQ(layout.block(0, 1).a_offset, 192);
  EXPECT_EQ(layout.block(0, 1).b_offset, 240);
  EXPECT_EQ(layout.layer_offset(0), 0);
  EXPECT_EQ(layout.layer_bytes(0), 512);
  EXPECT_EQ(layout.layer_bytes(1), 0);
  EXPECT_EQ(layout.layer_offset(2), 512);
  EXPECT_EQ(layout.layer_bytes(2), 128);
  EXPECT_EQ(layout.bytes(), 640);
  EXPECT_EQ(layout.max_layer_bytes(), 512);
  EXPECT_EQ(layout.max_rank(), 3);
}

TEST(AdapterLayout, PadsEveryBlockToTheAlignment) {
  const auto shape = std::make_shared<const ModelShape>(
      std::vector<std::vector<Projection>>{{{"a", 1, 1}, {"b", 3, 5}, {"c", 33, 1}}});
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    const auto size = static_cast<std::int64_t>(size_of(dtype));
    const AdapterLayout layout(shape, dtype, {{1, 7, 2}});
    std::int64_t end = 0;
    for (int i = 0; i < 3; ++i) {
      const Projection& projection = shape->layer(0)[static_cast<std::size_t>(i)];
      const Block& block = layout.block(0, i);
      EXPECT_EQ(block.a_offset * size % kBlockAlignment, 0);
      EXPECT_GE(block.a_offset * size, end);
      EXPECT_LT(block.a_offset * size, end + kBlockAlignment);
      EXPECT_EQ(block.b_offset, block.a_offset + block.rank * projection.in);
      end = (block.b_offset + block.rank * projection.out) * size;
    }
    EXPECT_EQ(layout.layer_bytes(0),
              (end + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment);
  }
}

TEST(AdapterLayout, AbsentProjectionsTakeNothing) {
  const AdapterLayout layout(small_shape(), DType::f32, {{0, 4}, {}, {0}});
  EXPECT_EQ(layout.block(0, 0).rank, 0);
  EXPECT_EQ(layout.block(0, 1).a_offset, 0);
  EXPECT_EQ(layout.layer_bytes(0), 4 * 32 * 4);
  EXPECT_EQ(layout.layer_bytes(2), 0);
  EXPECT_EQ(layout.layer_offset(2), layout.bytes());
}

TEST(AdapterLayout, RefusesRanksThatDontFit) {
  const auto make = [](const Ranks& ranks) {
    return AdapterLayout(small_shape(), DType::bf16, ranks);
  };
  TOPPINGS_EXPECT_ERROR(make({{1, 1}, {}}), mismatch);
  TOPPINGS_EXPECT_ERROR(make({{1}, {}, {1}}), mismatch);
  TOPPINGS_EXPECT_ERROR(make({{1, 1}, {1}, {1}}), mismatch);
  TOPPINGS_EXPECT_ERROR(make({{1, -1}, {}, {1}}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(make({{0, 0}, {}, {0}}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(make({{std::int64_t{1} << 31, 0}, {}, {0}}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(AdapterLayout(nullptr, DType::bf16, {}), invalid_argument);
}

TEST(AdapterLayout, RefusesSizesBeyond63Bits) {
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  const auto wide = std::make_shared<const ModelShape>(
      std::vector<std::vector<Projection>>{{{"a", kMax, kMax}, {"b", kMax, kMax}}});
  TOPPINGS_EXPECT_ERROR(AdapterLayout(wide, DType::f32, {{kMax, 0}}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(AdapterLayout(wide, DType::bf16, {{kMax / 2, kMax / 2 + 2}}),
                        invalid_argument);
  EXPECT_GT(AdapterLayout(wide, DType::bf16, {{kMax / 4, 0}}).bytes(), std::int64_t{1} << 60);
}

TEST(AdapterLayout, RefusesIndicesOutOfRange) {
  const AdapterLayout layout(small_shape(), DType::f16, {{1, 1}, {}, {1}});
  TOPPINGS_EXPECT_ERROR(layout.block(1, 0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(layout.block(3, 0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(layout.layer_bytes(3), invalid_argument);
  TOPPINGS_EXPECT_ERROR(layout.layer_offset(-1), invalid_argument);
}

}  // namespace
}  // namespace toppings
