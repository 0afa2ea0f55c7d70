// SPDX-License-Identifier: Apache-2.0
#include <toppings/arena.h>

#include <algorithm>

#include "forwarding_device.h"
#include "testing.h"

namespace toppings {
namespace {

TEST(HostDevice, GivesZeroedAlignedMemory) {
  const auto device = host_device();
  EXPECT_EQ(device->name(), "host");
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{1000}, std::size_t{3} << 20}) {
    for (int round = 0; round < 2; ++round) {  // the second one may get the first one's memory
      auto* data = static_cast<std::byte*>(device->allocate(bytes));
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 64, 0U);
      EXPECT_TRUE(std::all_of(data, data + bytes, [](std::byte b) { return b == std::byte{0}; }));
      std::memset(data, 0xA5, bytes);
      device->deallocate(data, bytes);
    }
  }
  device->deallocate(nullptr, 64);
}

TEST(HostDevice, RefusesWhatItCantGive) {
  TOPPINGS_EXPECT_ERROR(host_device()->allocate(0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(host_device()->allocate(std::size_t{1} << 60), out_of_memory);
}

TEST(HostDevice, Copies) {
  const std::string source = "bytes";
  std::string target(source.size(), ' ');
  host_device()->copy(target.data(), source.data(), source.size());
  EXPECT_EQ(target, source);
}

TEST(Arena, HasOneAllocationPerLayer) {
  const Arena arena(host_device(), 3, 1000, DType::bf16);
  EXPECT_EQ(arena.num_layers(), 3);
  EXPECT_EQ(arena.bytes_per_layer(), 1024);
  EXPECT_EQ(arena.dtype(), DType::bf16);
  EXPECT_EQ(arena.device(), host_device());
  for (int layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(arena.layer(layer)) % 64, 0U);
    std::memset(arena.layer(layer), layer + 1, 1024);
  }
  for (int layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(arena.layer(layer)[1023], static_cast<std::byte>(layer + 1));
  }
  TOPPINGS_EXPECT_ERROR(arena.layer(3), invalid_argument);
}

TEST(Arena, RefusesNonsense) {
  TOPPINGS_EXPECT_ERROR(Arena(nullptr, 1, 64, DType::f32), invalid_argument);
  TOPPINGS_EXPECT_ERROR(Arena(host_device(), 0, 64, DType::f32), invalid_argument);
  TOPPINGS_EXPECT_ERROR(Arena(host_device(), 1, 0, DType::f32), invalid_argument);
  TOPPINGS_EXPECT_ERROR(Arena(host_device(), 1, INT64_MAX, DType::f32), invalid_argument);
}

// Has memory for a few allocations and counts those that aren't given back.
class SmallDevice final : public testing::ForwardingDevice {
 public:
  explicit SmallDevice(int capacity) : ForwardingDevice(host_device()), capacity_(capacity) {}
  int live() const noexcept { return live_; }

  void* allocate(std::size_t bytes) override {
    if (live_ == capacity_) throw Error(Status::out_of_memory, "memory: expected some, got none");
    ++live_;
    return ForwardingDevice::allocate(bytes);
  }
  void deallocate(void* data, std::size_t bytes) noexcept override {
    ForwardingDevice::deallocate(data, bytes);
    --live_;
  }

 private:
  int capacity_;
  int live_ = 0;
};

TEST(Arena, GivesEverythingBack) {
  const auto device = std::make_shared<SmallDevice>(3);
  TOPPINGS_EXPECT_ERROR(Arena(device, 4, 64, DType::f32), out_of_memory);
  EXPECT_EQ(device->live(), 0);
  {
    const Arena arena(device, 3, 64, DType::f32);
    EXPECT_EQ(device->live(), 3);
  }
  EXPECT_EQ(device->live(), 0);
}

}  // namespace
}  // namespace toppings
