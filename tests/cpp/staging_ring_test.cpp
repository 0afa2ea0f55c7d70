// SPDX-License-Identifier: Apache-2.0
#include "slots/staging_ring.h"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <future>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

namespace toppings {
namespace {

using std::chrono_literals::operator""ms;

// Copies wait until `gate` is written, so that the ring's memory is still to be read.
class StagingRingTest : public ::testing::Test {
 protected:
  using Row = std::array<std::uint32_t, 16>;  // 64 bytes

  static Row row(std::uint32_t value) {
    Row row;
    row.fill(value);
    return row;
  }

  void copy(Row& target, std::uint32_t value) {
    const Row source = row(value);  // gone when this returns
    ring_.copy(*stream_, target.data(), source.data(), sizeof(source));
  }

  void open() {
    const auto other = device_->make_stream();
    other->write_value(&gate_, 1);
    other->synchronize();
  }

  std::shared_ptr<Device> device_ = host_device();
  std::uint32_t gate_ = 0;
  std::unique_ptr<Stream> stream_ = device_->make_stream();
  StagingRing ring_{device_, 4 * sizeof(Row)};
};

TEST_F(StagingRingTest, KeepsWhatIsStillToBeRead) {
  std::array<Row, 4> targets{};
  stream_->wait_value(&gate_, 1);
  for (std::uint32_t i = 0; i < targets.size(); ++i) copy(targets[i], i + 1);
  EXPECT_EQ(targets[0], row(0));
  open();
  stream_->synchronize();
  for (std::uint32_t i = 0; i < targets.size(); ++i) EXPECT_EQ(targets[i], row(i + 1));
}

TEST_F(StagingRingTest, WaitsWhenItIsFull) {
  std::array<Row, 6> targets{};
  stream_->wait_value(&gate_, 1);
  for (std::uint32_t i = 0; i < 4; ++i) copy(targets[i], i + 1);
  auto more = std::async(std::launch::async, [&] {
    for (std::uint32_t i = 4; i < 6; ++i) copy(targets[i], i + 1);
  });
  EXPECT_EQ(more.wait_for(20ms), std::future_status::timeout);
  open();
  more.get();
  stream_->synchronize();
  for (std::uint32_t i = 0; i < targets.size(); ++i) EXPECT_EQ(targets[i], row(i + 1));
}

// Pieces of mixed sizes leave gaps at the end, so that places come round in another order.
TEST_F(StagingRingTest, NeverTakesWhatIsStillToBeRead) {
  for (std::uint32_t seed = 0; seed < 50; ++seed) {
    std::mt19937 random(seed);
    gate_ = 0;
    StagingRing ring(device_, 100);
    std::vector<std::vector<std::byte>> targets(30);
    stream_->wait_value(&gate_, 1);
    auto all = std::async(std::launch::async, [&] {
      for (std::size_t i = 0; i < targets.size(); ++i) {
        targets[i].resize(1 + random() % 25);
        const std::vector<std::byte> source(targets[i].size(), static_cast<std::byte>(i + 1));
        ring.copy(*stream_, targets[i].data(), source.data(), source.size());
      }
    });
    EXPECT_EQ(all.wait_for(1ms), std::future_status::timeout);  // it is full
    open();
    all.get();
    stream_->synchronize();
    for (std::size_t i = 0; i < targets.size(); ++i) {
      const std::vector<std::byte> expected(targets[i].size(), static_cast<std::byte>(i + 1));
      EXPECT_EQ(targets[i], expected) << "seed " << seed << ", copy " << i;
    }
  }
}

TEST_F(StagingRingTest, PiecesOfAllSizesGoRound) {
  std::array<std::uint32_t, 16> source;
  std::array<std::array<std::uint32_t, 16>, 200> targets{};
  for (std::uint32_t i = 0; i < targets.size(); ++i) {
    std::iota(source.begin(), source.end(), 100 * i);
    ring_.copy(*stream_, targets[i].data(), source.data(), (i % 17) * sizeof(source[0]));
  }
  stream_->synchronize();
  for (std::uint32_t i = 0; i < targets.size(); ++i) {
    for (std::uint32_t k = 0; k < source.size(); ++k) {
      EXPECT_EQ(targets[i][k], k < i % 17 ? 100 * i + k : 0U);
    }
  }
}

}  // namespace
}  // namespace toppings
