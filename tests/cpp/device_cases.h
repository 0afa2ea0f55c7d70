// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "device_memory.h"
#include "testing.h"

// What every device does. A test file instantiates DeviceTest for the devices that it has; their
// memory must be readable by the CPU.
namespace toppings::testing {

using std::chrono::milliseconds;

struct DeviceCase {
  std::string name;
  std::function<std::shared_ptr<Device>()> make;
};

class DeviceTest : public ::testing::TestWithParam<DeviceCase> {
 protected:
  std::shared_ptr<Device> device_ = GetParam().make();
};

TEST_P(DeviceTest, GivesZeroedAlignedMemory) {
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{1000}, std::size_t{3} << 20}) {
    for (int round = 0; round < 2; ++round) {  // the second one may get the first one's memory
      const DeviceMemory device_memory(device_, bytes);
      const Memory host_memory(device_, bytes);
      for (std::byte* data : {device_memory.data(), host_memory.data()}) {
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 64, 0U);
        EXPECT_TRUE(std::all_of(data, data + bytes, [](std::byte b) { return b == std::byte{0}; }));
        std::memset(data, 0xA5, bytes);
      }
    }
  }
  device_->deallocate(nullptr, 64);
  device_->deallocate_host(nullptr, 64);
}

TEST_P(DeviceTest, RefusesWhatItCantGive) {
  TOPPINGS_EXPECT_ERROR(device_->allocate(0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(device_->allocate_host(0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(device_->allocate(std::size_t{1} << 60), out_of_memory);
  TOPPINGS_EXPECT_ERROR(device_->allocate_host(std::size_t{1} << 60), out_of_memory);
}

TEST_P(DeviceTest, CopiesBeforeItReturns) {
  const Memory source(device_, 4096);
  const DeviceMemory target(device_, 4096);
  std::memset(source.data(), 7, 4096);
  device_->copy(target.data(), source.data(), 4096);
  EXPECT_EQ(std::memcmp(target.data(), source.data(), 4096), 0);
}

TEST_P(DeviceTest, CopiesFromMemoryThatWasLocked) {
  alignas(4096) static std::byte source[8192];
  const DeviceMemory target(device_, sizeof source);
  const auto stream = device_->make_stream();
  std::memset(source, 9, sizeof source);
  device_->page_lock(source, sizeof source);
  stream->copy(target.data(), source, sizeof source);
  stream->synchronize();
  device_->page_unlock(source);
  EXPECT_EQ(std::memcmp(target.data(), source, sizeof source), 0);
}

TEST_P(DeviceTest, RunsAStreamInOrder) {
  Memory source(device_, 4096);
  const DeviceMemory target(device_, 4096);
  const auto stream = device_->make_stream();
  const auto event = device_->make_event();
  constexpr std::uint32_t kCopies = 1000;
  for (std::uint32_t i = 0; i < kCopies; ++i) source.store(i, i + 1);
  for (std::uint32_t i = 0; i < kCopies; ++i) stream->copy(target.data(), source.word(i), 4);
  stream->record(*event);
  ASSERT_TRUE(event->wait_for(kPatience));
  EXPECT_TRUE(event->is_done());
  std::uint32_t last = 0;
  std::memcpy(&last, target.data(), 4);
  EXPECT_EQ(last, kCopies);
}

TEST_P(DeviceTest, ReturnsBeforeTheWorkHasRun) {
  Memory words(device_, 64);
  const DeviceMemory target(device_, 64);
  const auto stream = device_->make_stream();
  stream->wait_value(words.word(0), 1);
  stream->copy(target.data(), words.word(1), 4);
  stream->write_value(words.word(2), 1);
  words.store(1, 5);  // read by the copy, when it runs
  std::this_thread::sleep_for(milliseconds(5));
  EXPECT_EQ(words.load(2), 0U);
  words.store(0, 1);
  stream->synchronize();
  EXPECT_EQ(words.load(2), 1U);
  EXPECT_EQ(*reinterpret_cast<std::uint32_t*>(target.data()), 5U);
}

TEST_P(DeviceTest, RunsStreamsAtTheSameTime) {
  const Memory words(device_, 64);
  const auto first = device_->make_stream();
  const auto second = device_->make_stream();
  constexpr std::uint32_t kRounds = 50;
  for (std::uint32_t i = 1; i <= kRounds; ++i) {  // each needs the other to get on
    first->write_value(words.word(0), i);
    first->wait_value(words.word(1), i);
    second->wait_value(words.word(0), i);
    second->write_value(words.word(1), i);
  }
  first->synchronize();
  EXPECT_EQ(words.load(0), kRounds);
  EXPECT_EQ(words.load(1), kRounds);
}

TEST_P(DeviceTest, AnEventIsDoneBeforeItsFirstRecord) {
  const auto event = device_->make_event();
  EXPECT_TRUE(event->is_done());
  EXPECT_TRUE(event->wait_for(milliseconds(0)));
  device_->make_stream()->wait(*event);
}

TEST_P(DeviceTest, AWaitRunsOutOfTime) {
  Memory words(device_, 64);
  const auto stream = device_->make_stream();
  const auto event = device_->make_event();
  stream->wait_value(words.word(0), 1);
  stream->record(*event);
  EXPECT_FALSE(event->is_done());
  EXPECT_FALSE(event->wait_for(milliseconds(-1)));
  EXPECT_FALSE(event->wait_for(milliseconds(0)));
  const auto begin = std::chrono::steady_clock::now();
  EXPECT_FALSE(event->wait_for(milliseconds(5)));
  EXPECT_GE(std::chrono::steady_clock::now() - begin, milliseconds(5));
  words.store(0, 1);
  EXPECT_TRUE(event->wait_for(std::chrono::nanoseconds::max()));
  EXPECT_TRUE(event->is_done());
}

TEST_P(DeviceTest, TheLastRecordCounts) {
  Memory words(device_, 64);
  const auto stream = device_->make_stream();
  const auto event = device_->make_event();
  stream->wait_value(words.word(0), 1);
  stream->record(*event);
  stream->write_value(words.word(1), 1);
  stream->wait_value(words.word(0), 2);
  stream->record(*event);
  words.store(0, 1);
  while (words.load(1) == 0) std::this_thread::yield();
  EXPECT_FALSE(event->is_done());
  EXPECT_FALSE(event->wait_for(milliseconds(2)));
  words.store(0, 2);
  EXPECT_TRUE(event->wait_for(kPatience));
}

TEST_P(DeviceTest, AStreamWaitsForTheRecordSoFar) {
  Memory words(device_, 64);
  const auto first = device_->make_stream();
  const auto second = device_->make_stream();
  const auto event = device_->make_event();
  first->wait_value(words.word(0), 1);
  first->record(*event);
  second->wait(*event);
  second->write_value(words.word(1), 1);
  first->wait_value(words.word(0), 2);
  first->record(*event);
  std::this_thread::sleep_for(milliseconds(2));
  EXPECT_EQ(words.load(1), 0U);
  words.store(0, 1);
  second->synchronize();
  EXPECT_EQ(words.load(1), 1U);
  EXPECT_FALSE(event->is_done());
  words.store(0, 2);
  EXPECT_TRUE(event->wait_for(kPatience));
}

TEST_P(DeviceTest, AnEventMayGoBeforeItsRecordRuns) {
  Memory words(device_, 64);
  const auto first = device_->make_stream();
  const auto second = device_->make_stream();
  {
    const auto event = device_->make_event();
    first->wait_value(words.word(0), 1);
    first->record(*event);
    second->wait(*event);
  }
  second->write_value(words.word(1), 1);
  EXPECT_EQ(words.load(1), 0U);
  words.store(0, 1);
  second->synchronize();
  EXPECT_EQ(words.load(1), 1U);
}

// A number handed on through memory, from stream to stream, in an order only events make.
TEST_P(DeviceTest, StreamsWaitForEachOther) {
  constexpr int kStreams = 3, kHops = 300;
  const Memory numbers(device_, 4 * (kHops + 1));
  const DeviceMemory chain(device_, 4 * (kHops + 1));
  auto* hops = reinterpret_cast<std::uint32_t*>(chain.data());
  *numbers.word(0) = 17;
  std::vector<std::unique_ptr<Stream>> streams;
  for (int i = 0; i < kStreams; ++i) streams.push_back(device_->make_stream());
  const auto event = device_->make_event();
  for (int hop = 0; hop < kHops; ++hop) {
    Stream& stream = *streams[static_cast<std::size_t>(hop % kStreams)];
    stream.wait(*event);
    // Reads what the hop before, on another stream, has written.
    stream.copy(hops + hop, numbers.word(static_cast<std::size_t>(hop)), 4);
    stream.write_value(numbers.word(static_cast<std::size_t>(hop + 1)),
                       17 + static_cast<std::uint32_t>(hop + 1));
    stream.record(*event);
  }
  ASSERT_TRUE(event->wait_for(kPatience));
  for (int hop = 0; hop < kHops; ++hop) {
    EXPECT_EQ(hops[hop], 17U + static_cast<std::uint32_t>(hop)) << hop;
  }
}

TEST_P(DeviceTest, ValuesWrapAround) {
  Memory words(device_, 64);
  const auto stream = device_->make_stream();
  words.store(0, 2);
  stream->wait_value(words.word(0), 0xFFFFFFFE);  // 4 steps ago
  stream->synchronize();
  words.store(0, 0xFFFFFFFE);
  stream->wait_value(words.word(0), 2);  // in 4 steps
  stream->write_value(words.word(1), 1);
  std::this_thread::sleep_for(milliseconds(2));
  EXPECT_EQ(words.load(1), 0U);
  words.store(0, 1);
  std::this_thread::sleep_for(milliseconds(2));
  EXPECT_EQ(words.load(1), 0U);
  words.store(0, 2);
  stream->synchronize();
  EXPECT_EQ(words.load(1), 1U);
}

TEST_P(DeviceTest, AValueComesAfterTheBytesBeforeIt) {
  constexpr std::size_t kBytes = std::size_t{1} << 20;
  Memory source(device_, kBytes);
  const Memory words(device_, 64);
  const DeviceMemory target(device_, kBytes);
  const auto stream = device_->make_stream();
  for (std::uint32_t round = 1; round <= 20; ++round) {
    std::memset(source.data(), static_cast<int>(round), kBytes);
    stream->copy(target.data(), source.data(), kBytes);
    stream->write_value(words.word(0), round);
    while (words.load(0) != round) std::this_thread::yield();
    EXPECT_EQ(target.data()[kBytes - 1], static_cast<std::byte>(round));
  }
}

TEST_P(DeviceTest, AStreamsEndWaitsForItsWork) {
  Memory words(device_, 64);
  std::thread writer;
  {
    const auto stream = device_->make_stream();
    stream->wait_value(words.word(0), 1);
    stream->write_value(words.word(1), 1);
    writer = std::thread([&] {
      std::this_thread::sleep_for(milliseconds(3));
      words.store(0, 1);
    });
  }
  EXPECT_EQ(words.load(1), 1U);
  writer.join();
}

TEST_P(DeviceTest, TellsTheTimeBetweenEvents) {
  Memory words(device_, 64);
  const auto stream = device_->make_stream();
  const auto before = device_->make_event();
  const auto after = device_->make_event();
  TOPPINGS_EXPECT_ERROR(after->seconds_since(*before), invalid_argument);
  stream->record(*before);
  ASSERT_TRUE(before->wait_for(kPatience));
  TOPPINGS_EXPECT_ERROR(after->seconds_since(*before), invalid_argument);
  std::this_thread::sleep_for(milliseconds(4));
  stream->wait_value(words.word(0), 1);
  stream->record(*after);
  TOPPINGS_EXPECT_ERROR(after->seconds_since(*before), invalid_argument);
  words.store(0, 1);
  ASSERT_TRUE(after->wait_for(kPatience));
  EXPECT_GE(after->seconds_since(*before), 3.9e-3);  // recorded events have clocks of their own
  EXPECT_LE(after->seconds_since(*before), 60);
}

TEST_P(DeviceTest, RefusesAnotherDevicesEvents) {
  const auto other = host_device(HostLink{.bytes_per_second = 1e9});
  const auto event = other->make_event();
  other->wrap_stream(nullptr)->record(*event);
  const auto stream = device_->make_stream();
  TOPPINGS_EXPECT_ERROR(stream->record(*event), invalid_argument);
  TOPPINGS_EXPECT_ERROR(stream->wait(*event), invalid_argument);
  TOPPINGS_EXPECT_ERROR(device_->make_event()->seconds_since(*event), invalid_argument);
}

TEST_P(DeviceTest, ManyThreadsShareStreamsAndEvents) {
  constexpr int kThreads = 4;
  constexpr std::size_t kCopies = 200;
  const Memory source(device_, kThreads * kCopies * 4);
  const DeviceMemory target(device_, kThreads * kCopies * 4);
  for (std::uint32_t i = 0; i < kThreads * kCopies; ++i) *source.word(i) = i + 1;
  const auto first = device_->make_stream();
  const auto second = device_->make_stream();
  const auto shared = device_->make_event();
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      const auto own = device_->make_event();
      for (std::size_t i = t * kCopies; i < (t + 1) * kCopies; ++i) {
        Stream& stream = i % 2 == 0 ? *first : *second;
        stream.copy(target.data() + 4 * i, source.word(i), 4);
        stream.record(*own);
        stream.record(*shared);
        (i % 2 == 0 ? *second : *first).wait(*shared);
        if (i % 16 == 0) {
          EXPECT_TRUE(own->wait_for(kPatience));
        }
        shared->is_done();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  first->synchronize();
  second->synchronize();
  EXPECT_TRUE(shared->is_done());
  EXPECT_EQ(std::memcmp(target.data(), source.data(), kThreads * kCopies * 4), 0);
}

}  // namespace toppings::testing
