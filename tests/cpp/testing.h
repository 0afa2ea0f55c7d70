// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <toppings/error.h>
#include <toppings/host_store.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace toppings::testing {

using Ranks = std::vector<std::vector<std::int64_t>>;

// Runs `statement` and expects a toppings::Error of that status.
#define TOPPINGS_EXPECT_ERROR(statement, expected)                                               \
  try {                                                                                          \
    static_cast<void>(statement);                                                                \
    ADD_FAILURE() << #statement << ": expected an error, got none";                              \
  } catch (const toppings::Error& error) {                                                       \
    EXPECT_EQ(error.status(), toppings::Status::expected) << error.what();                       \
    EXPECT_NE(std::string(error.what()).find(": expected "), std::string::npos) << error.what(); \
  }

// Three layers: two projections that share their input, none, one.
inline std::shared_ptr<const ModelShape> small_shape() {
  return std::make_shared<const ModelShape>(
      std::vector<std::vector<Projection>>{{{"q", 24, 40}, {"k", 24, 8}}, {}, {{"o", 40, 24}}});
}

inline std::vector<float> random_floats(std::size_t count, std::mt19937_64& random) {
  std::uniform_real_distribution<float> uniform(-4, 4);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(random);
  return values;
}

inline std::vector<std::byte> as_dtype(const std::vector<float>& values, DType dtype) {
  std::vector<std::byte> bytes(values.size() * size_of(dtype));
  if (dtype == DType::f32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
  } else {
    convert(bytes.data(), dtype, values.data(), DType::f32, values.size());
  }
  return bytes;
}

// Fills every block of the builder with numbers that depend on the seed alone.
inline void fill(ImageBuilder& builder, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const AdapterLayout& layout = builder.layout();
  const ModelShape& shape = *layout.shape();
  for (int layer = 0; layer < shape.num_layers(); ++layer) {
    for (int i = 0; i < static_cast<int>(shape.layer(layer).size()); ++i) {
      const Projection& projection = shape.layer(layer)[static_cast<std::size_t>(i)];
      const std::int64_t rank = layout.block(layer, i).rank;
      if (rank == 0) continue;
      const auto a = random_floats(static_cast<std::size_t>(rank * projection.in), random);
      const auto b = random_floats(static_cast<std::size_t>(rank * projection.out), random);
      builder.set(layer, i, a.data(), b.data(), DType::f32, static_cast<float>(rank) + 0.5F);
    }
  }
}

inline std::shared_ptr<const Image> add_image(HostStore& store, const AdapterLayout& layout,
                                              const std::string& digest, std::uint64_t seed = 1) {
  ImageBuilder builder = store.build(layout, digest);
  fill(builder, seed);
  return store.insert(std::move(builder));
}

// One layer with one projection of one fp32 column in and out: 64 bytes for every 8 ranks.
inline AdapterLayout layout_of_bytes(std::int64_t bytes) {
  static const auto shape =
      std::make_shared<const ModelShape>(std::vector<std::vector<Projection>>{{{"p", 1, 1}}});
  return AdapterLayout(shape, DType::f32, {{bytes / 8}});
}

}  // namespace toppings::testing
