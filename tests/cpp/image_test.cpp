// SPDX-License-Identifier: Apache-2.0
#include <toppings/image.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "testing.h"

namespace toppings {
namespace {

using testing::as_dtype;
using testing::random_floats;
using testing::small_shape;

constexpr std::int64_t kBudget = std::int64_t{1} << 28;

// One element of the image at a time, straight from the definition.
std::vector<std::byte> naive_block(const std::vector<std::byte>& a, const std::vector<std::byte>& b,
                                   const Projection& projection, std::size_t rank, DType from,
                                   DType to) {
  const auto in = static_cast<std::size_t>(projection.in);
  const auto out = static_cast<std::size_t>(projection.out);
  std::vector<std::byte> block(rank * (in + out) * size_of(to));
  const auto put = [&](std::size_t at, const std::byte* element) {
    std::byte* dst = block.data() + at * size_of(to);
    if (from == to) {
      std::memcpy(dst, element, size_of(to));
    } else {
      convert(dst, to, element, from, 1);
    }
  };
  for (std::size_t i = 0; i < rank * in; ++i) put(i, a.data() + i * size_of(from));
  for (std::size_t r = 0; r < rank; ++r) {
    for (std::size_t n = 0; n < out; ++n) {
      put(rank * in + r * out + n, b.data() + (n * rank + r) * size_of(from));
    }
  }
  return block;
}

class ImageFill : public ::testing::TestWithParam<std::tuple<DType, DType>> {};

TEST_P(ImageFill, EqualsTheNaiveOne) {
  const auto [from, to] = GetParam();
  std::mt19937_64 random(3);
  HostStore store(host_device(), kBudget);
  // Widths around the tile and the panel; ranks from one to beyond a panel's worth of columns.
  const std::int64_t widths[] = {1, 7, 8, 9, 64, 129, 1000};
  for (const std::int64_t rank : {1, 3, 8, 13, 16, 64, 1100}) {
    for (const std::int64_t width : widths) {
      const auto shape = std::make_shared<const ModelShape>(
          std::vector<std::vector<Projection>>{{{"first", 5, 3}, {"p", 17, width}}});
      const AdapterLayout layout(shape, to, {{1, rank}});
      const Projection& projection = shape->layer(0)[1];
      const auto count = static_cast<std::size_t>(rank);
      const auto a = as_dtype(random_floats(count * 17, random), from);
      const auto b = as_dtype(random_floats(count * static_cast<std::size_t>(width), random), from);
      const auto first = as_dtype(random_floats(5, random), from);

      ImageBuilder builder = store.build(layout, "image");
      builder.set(0, 1, a.data(), b.data(), from, 0.25F);
      builder.set(0, 0, first.data(), first.data(), from, -2.0F);
      const auto image = store.insert(std::move(builder));

      const auto expected = naive_block(a, b, projection, count, from, to);
      const std::byte* block = image->layer_data(0) +
                               layout.block(0, 1).a_offset * static_cast<std::int64_t>(size_of(to));
      EXPECT_EQ(std::memcmp(block, expected.data(), expected.size()), 0)
          << "rank " << rank << ", width " << width;
      const std::byte* end = image->layer_data(0) + layout.layer_bytes(0);
      for (const std::byte* pad = block + expected.size(); pad < end; ++pad) {
        EXPECT_EQ(*pad, std::byte{0});
      }
      EXPECT_EQ(image->scale(0, 0), -2.0F);
      EXPECT_EQ(image->scale(0, 1), 0.25F);
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(image->layer_data(0)) % kBlockAlignment, 0U);
      store.erase("image");
    }
  }
}

INSTANTIATE_TEST_SUITE_P(AllPairs, ImageFill,
                         ::testing::Combine(::testing::Values(DType::f32, DType::f16, DType::bf16),
                                            ::testing::Values(DType::f32, DType::f16, DType::bf16)),
                         [](const auto& test) {
                           return std::string(name_of(std::get<0>(test.param))) + "_to_" +
                                  std::string(name_of(std::get<1>(test.param)));
                         });

TEST(ImageBuilder, KnowsWhatIsMissing) {
  HostStore store(host_device(), kBudget);
  ImageBuilder builder =
      store.build(AdapterLayout(small_shape(), DType::f32, {{1, 0}, {}, {2}}), "d");
  const std::vector<float> zeros(1000);
  builder.set(0, 0, zeros.data(), zeros.data(), DType::f32, 1);
  TOPPINGS_EXPECT_ERROR(store.insert(std::move(builder)), invalid_argument);
  builder.set(2, 0, zeros.data(), zeros.data(), DType::f32, 3);  // it can still be completed
  const auto image = store.insert(std::move(builder));
  EXPECT_EQ(image->scale(0, 1), 0);
  EXPECT_EQ(image->scale(2, 0), 3);
  EXPECT_EQ(image->digest(), "d");
}

TEST(ImageBuilder, RefusesWhatDoesntBelong) {
  HostStore store(host_device(), kBudget);
  ImageBuilder builder =
      store.build(AdapterLayout(small_shape(), DType::f16, {{1, 0}, {}, {2}}), "d");
  std::vector<float> values(1000);
  const auto set = [&](int layer, int projection, float scale) {
    builder.set(layer, projection, values.data(), values.data(), DType::f32, scale);
  };
  TOPPINGS_EXPECT_ERROR(set(0, 1, 1), invalid_argument);  // rank 0
  TOPPINGS_EXPECT_ERROR(set(1, 0, 1), invalid_argument);
  TOPPINGS_EXPECT_ERROR(set(3, 0, 1), invalid_argument);
  TOPPINGS_EXPECT_ERROR(set(0, 0, std::nanf("")), invalid_argument);
  TOPPINGS_EXPECT_ERROR(set(0, 0, std::numeric_limits<float>::infinity()), invalid_argument);
  TOPPINGS_EXPECT_ERROR(builder.set(0, 0, nullptr, values.data(), DType::f32, 1), invalid_argument);
  const auto* odd = reinterpret_cast<const std::byte*>(values.data()) + 1;
  TOPPINGS_EXPECT_ERROR(builder.set(0, 0, values.data(), odd, DType::f32, 1), invalid_argument);
  values[20] = 1e6F;  // beyond fp16
  TOPPINGS_EXPECT_ERROR(set(0, 0, 1), invalid_argument);
  values[20] = 0;
  set(0, 0, 1);  // the failed attempts didn't count
  TOPPINGS_EXPECT_ERROR(set(0, 0, 1), invalid_argument);
}

TEST(ImageBuilder, IsEmptyAfterwards) {
  HostStore store(host_device(), kBudget);
  ImageBuilder builder = store.build(testing::layout_of_bytes(64), "d");
  testing::fill(builder, 1);
  const auto image = store.insert(std::move(builder));
  const std::vector<float> values(8);
  TOPPINGS_EXPECT_ERROR(builder.set(0, 0, values.data(), values.data(), DType::f32, 1),
                        invalid_argument);
  TOPPINGS_EXPECT_ERROR(store.insert(std::move(builder)), invalid_argument);
}

}  // namespace
}  // namespace toppings
