// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <toppings/device.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "device_memory.h"
#include "host/link_model.h"

namespace toppings {
namespace {

using testing::DeviceMemory;
using testing::kPatience;
using testing::Memory;

constexpr double kTiny = 1e-9;

std::vector<double> ends_of(const LinkLane& lane) { return {lane.ends.begin(), lane.ends.end()}; }

void expect_ends(const LinkLane& lane, const std::vector<double>& expected) {
  const std::vector<double> ends = ends_of(lane);
  ASSERT_EQ(ends.size(), expected.size());
  for (std::size_t i = 0; i < ends.size(); ++i) EXPECT_NEAR(ends[i], expected[i], kTiny) << i;
}

// 100 bytes a second make the numbers easy.
TEST(LinkModel, OneCopyTakesLatencyAndTransfer) {
  LinkModel link(100, 0.5);
  LinkLane lane;
  link.append(lane, 200, 1);
  EXPECT_NEAR(link.earliest_end(lane), 3.5, kTiny);
  link.advance(3.4);
  expect_ends(lane, {});
  link.advance(3.6);
  expect_ends(lane, {3.5});
}

TEST(LinkModel, TwoShare) {
  LinkModel link(100, 0);
  LinkLane left, right;
  link.append(left, 100, 0);
  link.append(right, 300, 0);
  EXPECT_NEAR(link.earliest_end(left), 1, kTiny);  // "right" has yet to begin
  link.advance(0);
  EXPECT_NEAR(link.earliest_end(left), 2, kTiny);
  EXPECT_NEAR(link.earliest_end(right), 4, kTiny);
  link.advance(10);
  expect_ends(left, {2});
  expect_ends(right, {4});
}

TEST(LinkModel, ALateStarterDelaysTheOther) {
  LinkModel link(100, 0);
  LinkLane left, right;
  link.append(left, 200, 0);
  link.append(right, 50, 1);
  link.advance(10);
  expect_ends(left, {2.5});
  expect_ends(right, {2});
}

TEST(LinkModel, LatencyLeavesTheLinkToOthers) {
  LinkModel link(100, 1);
  LinkLane left, right;
  link.append(left, 100, 0);     // uses the link from 1 on
  link.append(right, 100, 0.5);  // from 1.5 on
  link.advance(10);
  expect_ends(left, {2.5});
  expect_ends(right, {3});
}

TEST(LinkModel, ALanesCopiesFollowOneAnother) {
  LinkModel link(100, 0.25);
  LinkLane lane;
  for (int i = 0; i < 3; ++i) link.append(lane, 100, 0.1 * i);
  link.advance(10);
  expect_ends(lane, {1.25, 2.25, 3.25});  // two latencies are hidden
  link.append(lane, 100, 10);
  link.append(lane, 10, 10.9);
  link.append(lane, 10, 11.3);
  link.advance(20);
  expect_ends(lane, {1.25, 2.25, 3.25, 11.25, 11.35, 11.65});
}

TEST(LinkModel, NothingTakesTheLatency) {
  LinkModel link(100, 1);
  LinkLane lane;
  link.append(lane, 0, 0);
  link.advance(2);
  expect_ends(lane, {1});
}

TEST(LinkModel, AForgottenLaneLeavesTheLink) {
  LinkModel link(100, 0);
  LinkLane left, right;
  link.append(left, 200, 0);
  link.append(right, 200, 0);
  link.advance(1);
  link.remove(right);
  link.advance(10);
  expect_ends(left, {2.5});
}

// Against the same thing in tiny steps, and by the bytes: never more than the capacity, never less
// while somebody could use it.
TEST(LinkModel, UsesItsCapacityWhateverHappens) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    std::mt19937_64 random(seed);
    std::uniform_real_distribution<double> uniform(0, 1);
    constexpr double kRate = 1000;
    LinkModel link(kRate, 0);
    std::vector<LinkLane> lanes(4);
    double now = 0, sent = 0, busy_until = 0;
    for (int i = 0; i < 200; ++i) {
      now += uniform(random) * 0.05;
      const double bytes = uniform(random) * 100;
      auto& lane = lanes[static_cast<std::size_t>(uniform(random) * 4)];
      link.append(lane, bytes, now);
      sent += bytes;
      busy_until = std::max(busy_until, now) + bytes / kRate;  // all of them as one queue
    }
    link.advance(1e6);
    double last = 0;
    std::size_t count = 0;
    for (const LinkLane& lane : lanes) {
      last = std::max(last, lane.ends.back());
      count += lane.ends.size();
      EXPECT_TRUE(std::is_sorted(lane.ends.begin(), lane.ends.end()));
    }
    EXPECT_EQ(count, 200U);
    EXPECT_GE(last, sent / kRate);
    EXPECT_NEAR(last, busy_until, 1e-6) << "seed " << seed;
  }
}

// In real time. The machine may be busy with other things, so that upper bounds hold for the best
// of many tries; lower bounds always hold.
class LinkedDevice : public ::testing::Test {
 protected:
  static constexpr std::size_t kBytes = std::size_t{2} << 20;
  static constexpr double kRate = 500e6;  // so that kBytes take 4.2 ms
  static constexpr double kSeconds = static_cast<double>(kBytes) / kRate;
  static constexpr double kSlack = 1.25;  // for an upper bound
  static constexpr int kTries = 50;
  static constexpr double kResolution = 2e-9;  // times are whole nanoseconds

  void use(double latency) {
    device_ = host_device(HostLink{.bytes_per_second = kRate, .latency_seconds = latency});
    source_ = std::make_unique<Memory>(device_, kBytes);
    target_ = std::make_unique<DeviceMemory>(device_, 2 * kBytes);
    std::memset(target_->data(), 1, 2 * kBytes);  // page faults are no part of the link
    std::memset(source_->data(), 2, kBytes);
  }

  // Each time is at least `least`, and one of them at most `most`.
  template <class F>
  static void expect_time(double least, double most, F time) {
    double smallest = 1e9;
    for (int i = 0; i < kTries && smallest > most; ++i) {
      const double seconds = time();
      EXPECT_GE(seconds, least - kResolution);
      smallest = std::min(smallest, seconds);
    }
    EXPECT_LE(smallest, most);
  }

  template <class F>
  static double wall(F run) {
    const auto begin = std::chrono::steady_clock::now();
    run();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }

  std::shared_ptr<Device> device_;
  std::unique_ptr<Memory> source_;
  std::unique_ptr<DeviceMemory> target_;
};

TEST_F(LinkedDevice, ACopyTakesItsTime) {
  constexpr double kLatency = 1e-3, kExpected = kLatency + kSeconds;
  use(kLatency);
  const auto stream = device_->make_stream();
  const auto caller = device_->wrap_stream(nullptr);
  const auto copy_by_stream = [&] {
    stream->copy(target_->data(), source_->data(), kBytes);
    stream->synchronize();
  };
  expect_time(kExpected, kSlack * kExpected, [&] { return wall(copy_by_stream); });
  const auto copy_by_caller = [&] { caller->copy(target_->data(), source_->data(), kBytes); };
  expect_time(kExpected, kSlack * kExpected, [&] { return wall(copy_by_caller); });
  const auto copy = [&] { device_->copy(target_->data(), source_->data(), kBytes); };
  expect_time(kExpected, kSlack * kExpected, [&] { return wall(copy); });
}

TEST_F(LinkedDevice, CopiesUnderWayShareIt) {
  use(0);
  const auto left = device_->make_stream();
  const auto right = device_->make_stream();
  const auto copy_both = [&] {
    left->copy(target_->data(), source_->data(), kBytes);
    right->copy(target_->data() + kBytes, source_->data(), kBytes);
    left->synchronize();
    right->synchronize();
  };
  expect_time(2 * kSeconds, kSlack * 2 * kSeconds, [&] { return wall(copy_both); });
}

TEST_F(LinkedDevice, ALateStarterDelaysTheOther) {
  use(0);
  const auto left = device_->make_stream();
  const auto right = device_->make_stream();
  const auto begin = device_->make_event();
  const auto left_end = device_->make_event();
  const auto right_end = device_->make_event();
  constexpr double kMost = kSlack * (kSeconds / 8 + kSeconds);
  double smallest = 1e9;
  for (int i = 0; i < kTries && smallest > kMost; ++i) {
    left->record(*begin);
    left->copy(target_->data(), source_->data(), kBytes);
    left->record(*left_end);
    std::this_thread::sleep_for(std::chrono::duration<double>(kSeconds / 2));
    right->copy(target_->data() + kBytes, source_->data(), kBytes / 8);
    right->record(*right_end);
    ASSERT_TRUE(left_end->wait_for(kPatience));
    ASSERT_TRUE(right_end->wait_for(kPatience));
    // If the sleep wasn't much too long, they met.
    if (right_end->seconds_since(*begin) > kSeconds) continue;
    EXPECT_GE(left_end->seconds_since(*begin), kSeconds / 8 + kSeconds - kResolution);
    smallest = std::min(smallest, left_end->seconds_since(*begin));
  }
  EXPECT_LE(smallest, kMost);
}

// A thread that wakes late must not leave the link idle: the end of many copies is as exact as the
// end of one.
TEST_F(LinkedDevice, ManySmallCopiesFollowOneAnother) {
  constexpr double kLatency = 20e-6;
  constexpr std::size_t kSmall = 32768, kCopies = kBytes / kSmall;
  constexpr double kExpected = kLatency + kCopies * (kSmall / kRate);
  use(kLatency);
  const auto stream = device_->make_stream();
  const auto begin = device_->make_event();
  const auto end = device_->make_event();
  const auto copy = [&] {
    stream->record(*begin);
    for (std::size_t i = 0; i < kCopies; ++i) {
      stream->copy(target_->data() + i * kSmall, source_->data() + i * kSmall, kSmall);
    }
    stream->record(*end);
    EXPECT_TRUE(end->wait_for(kPatience));
    return end->seconds_since(*begin);
  };
  expect_time(kExpected, 1.02 * kExpected, copy);
}

TEST_F(LinkedDevice, EventsTellWhenTheLinkWasThrough) {
  constexpr std::size_t kCopies = 8;
  use(0);
  const auto stream = device_->make_stream();
  const auto begin = device_->make_event();
  std::vector<std::unique_ptr<Event>> events;
  for (std::size_t i = 0; i < kCopies; ++i) events.push_back(device_->make_event());
  std::vector<double> smallest(kCopies, 1e9);
  for (int i = 0; i < 10; ++i) {
    stream->record(*begin);
    for (const auto& event : events) {
      stream->copy(target_->data(), source_->data(), kBytes / kCopies);
      stream->record(*event);
    }
    stream->synchronize();
    for (std::size_t e = 0; e < kCopies; ++e) {
      smallest[e] = std::min(smallest[e], events[e]->seconds_since(*begin));
    }
  }
  for (std::size_t e = 0; e < kCopies; ++e) {
    const double expected = static_cast<double>(e + 1) * kSeconds / kCopies;
    EXPECT_GE(smallest[e], expected - kResolution) << e;
    EXPECT_LE(smallest[e], 2 * expected) << e;
  }
}

TEST_F(LinkedDevice, ManyStreamsNeverExceedIt) {
  constexpr std::size_t kStreams = 4, kSmall = 65536, kCopies = kBytes / kSmall;
  use(5e-6);
  std::vector<std::unique_ptr<Stream>> streams;
  for (std::size_t i = 0; i < kStreams; ++i) streams.push_back(device_->make_stream());
  const auto copy = [&] {
    for (std::size_t i = 0; i < kCopies; ++i) {
      streams[i % kStreams]->copy(target_->data() + i * kSmall, source_->data() + i * kSmall,
                                  kSmall);
    }
    for (const auto& stream : streams) stream->synchronize();
  };
  expect_time(kSeconds, 2 * kSeconds, [&] { return wall(copy); });
}

TEST_F(LinkedDevice, ACopyBehindAWaitStartsAfterIt) {
  use(0);
  const auto first = device_->make_stream();
  const auto second = device_->make_stream();
  const auto half = device_->make_event();
  const auto copy_both = [&] {
    first->copy(target_->data(), source_->data(), kBytes);
    first->record(*half);
    second->wait(*half);
    second->copy(target_->data() + kBytes, source_->data(), kBytes / 2);
    second->synchronize();
  };
  expect_time(1.5 * kSeconds, kSlack * 1.5 * kSeconds, [&] { return wall(copy_both); });
}

}  // namespace
}  // namespace toppings
