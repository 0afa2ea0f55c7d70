// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "cuda/ptx.cuh"
#include "sim.h"

// Bank conflicts and sectors of patterns whose counts are known.
namespace toppings::sim {
namespace {

using namespace cuda;

// ---- shared memory

// Lane i accesses T at i * stride bytes.
template <class T>
TOPPINGS_KERNEL shared_strided(unsigned stride) {
  std::byte* at = dynamic_shared() + thread_index().x * stride;
  store_shared(at, T{});
  if (load_shared<T>(at).w[0] != 0) store_shared(at, T{});
}

struct Vec4 {
  std::uint32_t w[1];
};

template <class T>
SharedTraffic loads(unsigned stride, const Options& options) {
  const Report report =
      launch(shared_strided<T>, {.block = {32}, .shared_bytes = 32 * stride + 16}, options, stride);
  EXPECT_EQ(report.text(), "");
  EXPECT_EQ(report.shared_stores.wavefronts, report.shared_loads.wavefronts);
  EXPECT_EQ(report.shared_loads.requests, 1);
  return report.shared_loads;
}

TEST(Traffic, BankConflicts) {
  for (const Options& options : all_schedules()) {
    SCOPED_TRACE(name_of(options));
    const auto expect = [](const SharedTraffic& got, int wavefronts, int ideal) {
      EXPECT_EQ(got.wavefronts, wavefronts);
      EXPECT_EQ(got.ideal_wavefronts, ideal);
    };
    expect(loads<Vec4>(4, options), 1, 1);
    expect(loads<Vec4>(8, options), 2, 1);
    expect(loads<Vec4>(128, options), 32, 1);
    expect(loads<Vec4>(132, options), 1, 1);
    expect(loads<Vec8>(8, options), 2, 2);
    expect(loads<Vec8>(16, options), 4, 2);
    expect(loads<Vec16>(16, options), 4, 4);
    expect(loads<Vec16>(32, options), 8, 4);
    expect(loads<Vec16>(128, options), 32, 4);
    expect(loads<Vec16>(144, options), 4, 4);
  }
}

TOPPINGS_KERNEL broadcast() {
  store_shared(dynamic_shared() + 4 * lane(), 1);
  sync_warp();
  store_shared(dynamic_shared() + 128 + 4 * lane(), load_shared<int>(dynamic_shared() + 20));
  sync_warp();
  // 16 bits: two lanes share a word.
  store_shared(dynamic_shared() + 2 * lane(), std::uint16_t{1});
}

TEST(Traffic, LanesShareWords) {
  const Report report = launch(broadcast, {.block = {32}, .shared_bytes = 256}, {});
  EXPECT_EQ(report.text(), "");
  EXPECT_EQ(report.shared_loads.wavefronts, 1);
  EXPECT_EQ(report.shared_stores.wavefronts, 3);
  EXPECT_EQ(report.shared_stores.ideal_wavefronts, 3);
}

// Rows of 64 numbers of 16 bits, with padding or swizzled.
TOPPINGS_KERNEL load_tiles(unsigned row_bytes, bool swizzled) {
  const unsigned row = lane() % 16;
  for (unsigned k = 0; k < 4; ++k) {
    unsigned chunk = k * 2 + lane() / 16;
    if (swizzled) chunk ^= row % 8;
    std::uint32_t r[4];
    load_matrix_x4(r, dynamic_shared() + row * row_bytes + chunk * 16);
  }
}

TEST(Traffic, ConflictsOfLoadMatrix) {
  const auto expect = [](unsigned row_bytes, bool swizzled, int wavefronts) {
    const Report report = launch(load_tiles, {.block = {32}, .shared_bytes = 16 * row_bytes}, {},
                                 row_bytes, swizzled);
    EXPECT_EQ(report.text(), "");
    EXPECT_EQ(report.shared_loads.requests, 4);
    EXPECT_EQ(report.shared_loads.ideal_wavefronts, 16);
    EXPECT_EQ(report.shared_loads.wavefronts, wavefronts);
  };
  expect(128, false, 128);  // eight rows in the same four banks
  expect(144, false, 16);
  expect(160, false, 32);
  expect(128, true, 16);
}

// ---- global memory

// Thread i loads T number i * stride.
template <class T>
TOPPINGS_KERNEL global_strided(const std::byte* x, std::uint32_t* y, unsigned stride, int times) {
  const unsigned i = block_index().x * block_size().x + thread_index().x;
  std::uint32_t sum = 0;
  for (int time = 0; time < times; ++time) {
    sum += load_global<T>(x + std::size_t{i} * stride * sizeof(T)).w[0];
  }
  store_global(y + i, sum);
}

template <class T>
Report global(unsigned stride, int times, const Options& options) {
  constexpr unsigned kThreads = 2 * 64;
  std::vector<std::byte> memory(kThreads * stride * sizeof(T) + 32);
  std::vector<std::uint32_t> result(kThreads + 8);
  const auto on_sector = [](auto* p) {
    return p + (-reinterpret_cast<std::uintptr_t>(p) % 32) / sizeof *p;
  };
  const Report report = launch(global_strided<T>, {.grid = {2}, .block = {64}}, options,
                               on_sector(memory.data()), on_sector(result.data()), stride, times);
  EXPECT_EQ(report.text(), "");
  EXPECT_EQ(report.global_stores.requests, 4);
  EXPECT_EQ(report.global_stores.sectors, 16);
  EXPECT_EQ(report.global_stores.distinct_sectors, 16);
  EXPECT_EQ(report.global_loads.requests, 4 * times);
  return report;
}

TEST(Traffic, Sectors) {
  for (const Options& options : all_schedules()) {
    SCOPED_TRACE(name_of(options));
    const auto expect = [](const Report& report, int sectors, int distinct) {
      EXPECT_EQ(report.global_loads.sectors, sectors);
      EXPECT_EQ(report.global_loads.distinct_sectors, distinct);
    };
    expect(global<Vec4>(1, 1, options), 16, 16);
    expect(global<Vec4>(2, 1, options), 32, 32);
    expect(global<Vec4>(8, 1, options), 128, 128);
    expect(global<Vec16>(1, 1, options), 64, 64);
    expect(global<Vec16>(2, 1, options), 128, 128);
    expect(global<Vec4>(0, 1, options), 4, 1);  // one address for all
    expect(global<Vec16>(1, 3, options), 192, 64);
  }
}

// Lanes that leave a loop early: the rest still make common requests.
TOPPINGS_KERNEL uneven(const std::uint32_t* x, std::uint32_t* y) {
  std::uint32_t sum = 0;
  for (unsigned i = 0; i <= lane() / 8; ++i) sum += load_global<std::uint32_t>(x + i * 32 + lane());
  store_global(y + lane(), sum);
  copy_async<16>(dynamic_shared() + lane() * 16, x + lane() * 4, lane() < 16 ? 16 : 0);
  commit_copies();
  wait_copies<0>();
}

TEST(Traffic, UnevenLoopsAndCopies) {
  alignas(32) static std::uint32_t x[128], y[32];
  const Report report = launch(uneven, {.block = {32}, .shared_bytes = 512}, {}, +x, +y);
  EXPECT_EQ(report.text(), "");
  EXPECT_EQ(report.global_loads.requests, 4 + 1);
  EXPECT_EQ(report.global_loads.sectors, 4 + 3 + 2 + 1 + 8);
  EXPECT_EQ(report.shared_copies.requests, 1);
  EXPECT_EQ(report.shared_copies.wavefronts, 4);
  EXPECT_EQ(report.sites.size(), 4u);
  EXPECT_NE(report.traffic_text().find("traffic_test.cpp:"), std::string::npos);
}

}  // namespace
}  // namespace toppings::sim
