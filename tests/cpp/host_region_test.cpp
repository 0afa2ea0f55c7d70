// SPDX-License-Identifier: Apache-2.0
#include "store/host_region.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <thread>

#include "testing.h"

namespace toppings {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;

bool is_zero(const std::byte* data, std::size_t bytes) {
  return std::all_of(data, data + bytes, [](std::byte byte) { return byte == std::byte{0}; });
}

// Pages of the range that are memory now.
std::size_t resident_pages(const std::byte* data, std::size_t bytes) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> resident(bytes / page);
  EXPECT_EQ(mincore(const_cast<std::byte*>(data), bytes, resident.data()), 0);
  return static_cast<std::size_t>(std::ranges::count_if(resident, [](int r) { return r & 1; }));
}

TEST(HostRegion, HandsOutZeroedPagesOfOneRange) {
  HostRegion region(16 * kMiB);
  const std::span<const std::byte> addresses = region.addresses();
  EXPECT_GE(addresses.size(), 16 * kMiB);
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{4097}, 3 * kMiB}) {
    std::byte* data = region.allocate(bytes);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(data) % 4096, 0U);
    EXPECT_TRUE(data >= addresses.data() && data + bytes <= addresses.data() + addresses.size());
    EXPECT_TRUE(is_zero(data, bytes));
    std::fill_n(data, bytes, std::byte{0xAB});
    region.deallocate(data, bytes);
    std::byte* again = region.allocate(bytes);  // first fit: the same place
    EXPECT_EQ(again, data);
    EXPECT_TRUE(is_zero(again, bytes));
    region.deallocate(again, bytes);
  }
  region.deallocate(nullptr, 1);
}

TEST(HostRegion, FreedPagesAreNoMemoryAnyMore) {
  HostRegion region(16 * kMiB);
  std::byte* data = region.allocate(4 * kMiB);
  EXPECT_EQ(resident_pages(data, 4 * kMiB), 0U);
  std::fill_n(data, 4 * kMiB, std::byte{1});
  EXPECT_EQ(resident_pages(data, 4 * kMiB), 4 * kMiB / 4096);
  region.deallocate(data, 4 * kMiB);
  EXPECT_EQ(resident_pages(data, 4 * kMiB), 0U);
  EXPECT_DEATH(*static_cast<volatile std::byte*>(data), "");
}

TEST(HostRegion, ATouchedPageBringsNoOthers) {
  HostRegion region(64 * kMiB);
  std::byte* data = region.allocate(kMiB);
  data[0] = std::byte{1};
  EXPECT_LE(resident_pages(data, kMiB), 16U);
}

TEST(HostRegion, SaysWhenItHasNoRoom) {
  TOPPINGS_EXPECT_ERROR(HostRegion(std::size_t{1} << 60), out_of_memory);
  HostRegion region(4 * kMiB);
  std::byte* first = region.allocate(3 * kMiB);
  TOPPINGS_EXPECT_ERROR(region.allocate(3 * kMiB), out_of_memory);
  region.deallocate(first, 3 * kMiB);
  region.deallocate(region.allocate(4 * kMiB), 4 * kMiB);
}

TEST(HostRegion, SurvivesThreads) {
  HostRegion region(64 * kMiB);
  std::atomic<int> broken = 0;
  const auto work = [&](std::uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int step = 0; step < 300; ++step) {
      const std::size_t bytes = 1 + random() % (64 * 1024);
      std::byte* data = region.allocate(bytes);
      if (!is_zero(data, bytes)) ++broken;
      std::fill_n(data, bytes, static_cast<std::byte>(seed));
      std::this_thread::yield();
      if (std::count(data, data + bytes, static_cast<std::byte>(seed)) !=
          static_cast<std::ptrdiff_t>(bytes)) {
        ++broken;
      }
      region.deallocate(data, bytes);
    }
  };
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 1; seed <= 3; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(broken, 0);
}

// As another process would map it: the same bytes, and a freed piece is no memory for either.
TEST(HostRegion, IsSharedThroughItsFile) {
  EXPECT_EQ(HostRegion(kMiB).file(), -1);
  HostRegion region(16 * kMiB, true);
  const std::size_t size = region.addresses().size();
  const auto blocks = [&] {
    struct stat status;
    EXPECT_EQ(fstat(region.file(), &status), 0);
    return status.st_blocks;
  };
  void* mapping = mmap(nullptr, size, PROT_READ, MAP_SHARED, region.file(), 0);
  ASSERT_NE(mapping, MAP_FAILED);
  EXPECT_EQ(blocks(), 0);

  region.allocate(kMiB);
  std::byte* data = region.allocate(3 * kMiB);
  const std::byte* seen =
      static_cast<const std::byte*>(mapping) + (data - region.addresses().data());
  EXPECT_TRUE(is_zero(data, 3 * kMiB));
  std::fill_n(data, 3 * kMiB, std::byte{0xAB});
  EXPECT_TRUE(std::equal(data, data + 3 * kMiB, seen));
  const auto used = blocks();
  region.deallocate(data, 3 * kMiB);
  EXPECT_LE(blocks(), used - static_cast<blkcnt_t>(3 * kMiB / 512));
  EXPECT_DEATH(*static_cast<volatile std::byte*>(data), "");
  std::byte* again = region.allocate(3 * kMiB);
  EXPECT_EQ(again, data);
  EXPECT_TRUE(is_zero(seen, 3 * kMiB));
  *again = std::byte{1};
  EXPECT_EQ(*seen, std::byte{1});
  munmap(mapping, size);
}

}  // namespace
}  // namespace toppings
