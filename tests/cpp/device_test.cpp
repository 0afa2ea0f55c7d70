// SPDX-License-Identifier: Apache-2.0
#include <sched.h>

#include <limits>
#include <thread>

#include "device_cases.h"
#include "host/affinity.h"
#include "host/host_stream.h"

namespace toppings {
namespace {

using testing::DeviceTest;
using testing::kPatience;
using testing::Memory;
using testing::milliseconds;

INSTANTIATE_TEST_SUITE_P(
    Host, DeviceTest,
    ::testing::Values(testing::DeviceCase{"plain", [] { return host_device(); }},
                      testing::DeviceCase{"link",
                                          [] {
                                            return host_device(HostLink{.bytes_per_second = 2e9,
                                                                        .latency_seconds = 2e-6});
                                          }}),
    [](const auto& info) { return info.param.name; });

TEST(HostDevice, SaysWhatItIs) {
  const auto plain = host_device();
  EXPECT_EQ(plain, host_device());
  EXPECT_EQ(plain->kind(), DeviceKind::host);
  EXPECT_EQ(plain->index(), 0);
  EXPECT_EQ(plain->name(), "host");
  EXPECT_TRUE(plain->is_in_place());
  const auto far = host_device(HostLink{.bytes_per_second = 4e9, .latency_seconds = 10e-6});
  EXPECT_EQ(far->name(), "host, link of 4.0 GB/s and 10 us (emulated)");
  EXPECT_FALSE(far->is_in_place());
  EXPECT_EQ(host_device(HostLink{.bytes_per_second = 2.5e6})->name(),
            "host, link of 2.5 MB/s and 0 us (emulated)");
}

TEST(HostDevice, RefusesLinksThatCantBe) {
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {0.0, -1.0, infinity, std::numeric_limits<double>::quiet_NaN()}) {
    TOPPINGS_EXPECT_ERROR(host_device(HostLink{.bytes_per_second = bad}), invalid_argument);
  }
  for (const double bad : {-1e-9, infinity, std::numeric_limits<double>::quiet_NaN()}) {
    TOPPINGS_EXPECT_ERROR(host_device(HostLink{.bytes_per_second = 1e9, .latency_seconds = bad}),
                          invalid_argument);
  }
  for (const int cpu : {-2, 1 << 20}) {
    TOPPINGS_EXPECT_ERROR(host_device(HostLink{.bytes_per_second = 1e9, .cpu = cpu}),
                          invalid_argument);
  }
}

TEST(HostDevice, HasStreamsOfOthersOnlyAsTheCallingThread) {
  int somewhere = 0;
  TOPPINGS_EXPECT_ERROR(host_device()->wrap_stream(&somewhere), invalid_argument);
  EXPECT_EQ(host_device()->wrap_stream(nullptr)->native(), nullptr);
}

TEST(CallingThread, WorksBeforeItReturns) {
  const auto device = host_device();
  const auto stream = device->wrap_stream(nullptr);
  const auto event = device->make_event();
  const std::uint32_t source = 5;
  std::uint32_t target = 0, value = 0;
  stream->copy(&target, &source, sizeof target);
  EXPECT_EQ(target, 5U);
  stream->record(*event);
  EXPECT_TRUE(event->is_done());
  stream->wait(*event);
  stream->write_value(&value, 3);
  EXPECT_EQ(value, 3U);
  stream->wait_value(&value, 2);
  stream->synchronize();
}

TEST(CallingThread, Waits) {
  const auto device = host_device();
  const Memory words(device, 64);
  const auto own = device->wrap_stream(nullptr);
  const auto other = device->make_stream();
  const auto event = device->make_event();
  other->wait_value(words.word(0), 1);
  other->record(*event);
  other->wait_value(words.word(0), 2);
  other->write_value(words.word(1), 1);
  own->write_value(words.word(0), 1);
  own->wait(*event);
  EXPECT_TRUE(event->is_done());
  EXPECT_EQ(words.load(1), 0U);
  own->write_value(words.word(0), 2);
  own->wait_value(words.word(1), 1);
  EXPECT_EQ(words.load(1), 1U);
}

TEST(Affinity, PinsToCoresThatExist) {
  check_cpu("cpu", -1);
  check_cpu("cpu", sched_getcpu());
  TOPPINGS_EXPECT_ERROR(check_cpu("cpu", -2), invalid_argument);
  TOPPINGS_EXPECT_ERROR(check_cpu("cpu", 1 << 20), invalid_argument);
  std::thread([] {
    cpu_set_t allowed;
    const int cpu = sched_getcpu();
    pin_this_thread(-1);
    pin_this_thread(cpu);
    ASSERT_EQ(sched_getaffinity(0, sizeof allowed, &allowed), 0);
    EXPECT_EQ(CPU_COUNT(&allowed), 1);
    EXPECT_TRUE(CPU_ISSET(static_cast<unsigned>(cpu), &allowed));
    TOPPINGS_EXPECT_ERROR(pin_this_thread(1 << 20), device_failed);
  }).join();
}

// The one thing that can go wrong in a host stream is that its thread can't go where it should.
TEST(HostStream, AFailureReachesEventsAndOtherStreams) {
  const auto device = host_device();
  const auto stays = device->make_event();
  const auto fails = device->make_event();
  std::uint32_t value = 0;
  HostStream healthy(*device, nullptr, -1);
  healthy.record(*stays);
  healthy.synchronize();
  HostStream broken(*device, nullptr, 1 << 20);
  broken.write_value(&value, 1);
  broken.record(*fails);
  TOPPINGS_EXPECT_ERROR(broken.synchronize(), device_failed);
  EXPECT_EQ(value, 0U);
  TOPPINGS_EXPECT_ERROR(fails->is_done(), device_failed);
  TOPPINGS_EXPECT_ERROR(fails->wait_for(kPatience), device_failed);
  TOPPINGS_EXPECT_ERROR(fails->seconds_since(*stays), device_failed);
  TOPPINGS_EXPECT_ERROR(device->wrap_stream(nullptr)->wait(*fails), device_failed);
  EXPECT_TRUE(stays->is_done());

  healthy.wait(*fails);
  TOPPINGS_EXPECT_ERROR(healthy.synchronize(), device_failed);
  device->wrap_stream(nullptr)->record(*fails);  // recorded elsewhere, it is well again
  EXPECT_TRUE(fails->is_done());
}

}  // namespace
}  // namespace toppings
