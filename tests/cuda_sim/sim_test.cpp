// SPDX-License-Identifier: Apache-2.0
#include "sim.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>

#include "clean.h"
#include "cuda/ptx.cuh"

// The instructions of ptx.cuh against plain C++: indices, warps, matrices.
namespace toppings::sim {
namespace {

using namespace cuda;

// ---- who am I

TOPPINGS_KERNEL identify(std::uint32_t* out) {
  const Index3 t = thread_index(), b = block_index(), n = block_size(), g = grid_size();
  const unsigned thread = (t.z * n.y + t.y) * n.x + t.x;
  const unsigned block = (b.z * g.y + b.y) * g.x + b.x;
  std::uint32_t* at = out + (block * n.x * n.y * n.z + thread) * 4;
  at[0] = thread;
  at[1] = block;
  at[2] = lane();
  at[3] = warp();
}

TEST(Sim, Indices) {
  constexpr unsigned kThreads = 32 * 3 * 2, kBlocks = 2 * 3 * 4;
  for (const Options& options : all_schedules()) {
    std::vector<std::uint32_t> out(kThreads * kBlocks * 4, ~0u);
    const LaunchConfig config{.grid = {2, 3, 4}, .block = {32, 3, 2}};
    EXPECT_EQ(launch(identify, config, options, out.data()).text(), "");
    for (unsigned i = 0; i < kThreads * kBlocks; ++i) {
      EXPECT_EQ(out[i * 4], i % kThreads);
      EXPECT_EQ(out[i * 4 + 1], i / kThreads);
      EXPECT_EQ(out[i * 4 + 2], i % kThreads % 32);
      EXPECT_EQ(out[i * 4 + 3], i % kThreads / 32);
    }
  }
}

TOPPINGS_KERNEL read_poison(std::uint32_t* out, std::size_t* misalignment) {
  out[thread_index().x] = load_shared<std::uint32_t>(dynamic_shared() + 4 * thread_index().x);
  if (thread_index().x == 0) {
    *misalignment = reinterpret_cast<std::uintptr_t>(dynamic_shared()) % 128;
  }
  sync_block();
  store_shared(dynamic_shared() + 4 * thread_index().x, 1);
}

TEST(Sim, SharedMemoryOfEveryBlockIsPoisonedAndAligned) {
  std::vector<std::uint32_t> out(64);
  std::size_t misalignment = 1;
  const Report report = launch(read_poison, {.grid = {9}, .block = {64}, .shared_bytes = 256},
                               {.blocks_in_flight = 2}, out.data(), &misalignment);
  EXPECT_EQ(report.text(), "");
  EXPECT_EQ(out, std::vector<std::uint32_t>(64, 0xffffffffu));
  EXPECT_EQ(misalignment, 0u);
  EXPECT_EQ(report.barriers, 9);
}

// ---- shuffles and votes

TOPPINGS_KERNEL exchange_values(double* out) {
  const double mine = 0.1 + lane();
  double* at = out + lane() * 8;
  at[0] = shuffle(mine, 5);
  at[1] = shuffle(mine, lane() + 33);
  at[2] = shuffle_xor(static_cast<float>(mine), 9);
  at[3] = shuffle_down(mine, 3);
  at[4] = shuffle_up(mine, 4);
  at[5] = ballot(lane() % 3 == 0);
  at[6] = any(lane() == 31) + 2 * any(lane() == 32);
  at[7] = all(lane() < 32) + 2 * all(lane() < 31);
}

TEST(Sim, ShufflesAndVotes) {
  for (const Options& options : all_schedules()) {
    SCOPED_TRACE(name_of(options));
    std::vector<double> out(32 * 8);
    EXPECT_EQ(launch(exchange_values, {.block = {32}}, options, out.data()).text(), "");
    for (unsigned i = 0; i < 32; ++i) {
      const double* at = &out[i * 8];
      EXPECT_EQ(at[0], 5.1);
      EXPECT_EQ(at[1], 0.1 + (i + 1) % 32);
      EXPECT_EQ(at[2], static_cast<float>(0.1 + (i ^ 9)));
      EXPECT_EQ(at[3], 0.1 + (i + 3 < 32 ? i + 3 : i));
      EXPECT_EQ(at[4], 0.1 + (i >= 4 ? i - 4 : i));
      EXPECT_EQ(at[5], 0x49249249u);
      EXPECT_EQ(at[6], 1);
      EXPECT_EQ(at[7], 1);
    }
  }
  EXPECT_EQ(count_bits(0xf1u), 5);
  EXPECT_EQ(lowest_bit(0x30u), 4);
  EXPECT_EQ(lowest_bit(0u), -1);
}

// ---- ldmatrix

TOPPINGS_KERNEL load_all_matrices(std::uint32_t* out, bool transposed) {
  std::byte* shared = dynamic_shared();
  // 32 rows of 8 numbers: number j of row i is i * 8 + j.
  for (unsigned j = 0; j < 8; ++j) {
    store_shared(shared + lane() * 16 + j * 2, static_cast<std::uint16_t>(lane() * 8 + j));
  }
  sync_warp();
  std::uint32_t r[4], q[2];
  if (transposed) {
    load_matrix_x4_transposed(r, shared + lane() * 16);
    load_matrix_x2_transposed(q, lane() < 16 ? shared + (lane() + 16) * 16 : nullptr);
  } else {
    load_matrix_x4(r, shared + lane() * 16);
    load_matrix_x2(q, lane() < 16 ? shared + (lane() + 16) * 16 : nullptr);
  }
  for (unsigned m = 0; m < 4; ++m) out[lane() * 6 + m] = r[m];
  for (unsigned m = 0; m < 2; ++m) out[lane() * 6 + 4 + m] = q[m];
}

TEST(Sim, LoadMatrix) {
  for (const bool transposed : {false, true}) {
    std::vector<std::uint32_t> out(32 * 6);
    expect_clean(load_all_matrices, {.block = {32}, .shared_bytes = 512}, out.data(), transposed);
    for (unsigned lane = 0; lane < 32; ++lane) {
      for (unsigned m = 0; m < 6; ++m) {
        const unsigned matrix = m < 4 ? m : m - 2, row = lane / 4, column = lane % 4 * 2;
        const auto number = [&](unsigned i, unsigned j) { return (matrix * 8 + i) * 8 + j; };
        const unsigned low = transposed ? number(column, row) : number(row, column);
        const unsigned high = transposed ? number(column + 1, row) : number(row, column + 1);
        EXPECT_EQ(out[lane * 6 + m], low | high << 16) << lane << " " << m;
      }
    }
  }
}

// ---- mma

// d [16][8] += a [16][16] b [8][16], as ldmatrix lays them out.
template <class T>
TOPPINGS_KERNEL multiply(const T* a, const T* b, float* d) {
  std::byte* shared = dynamic_shared();
  for (unsigned i = lane(); i < 256; i += 32) store_shared(shared + i * 2, a[i]);
  for (unsigned i = lane(); i < 128; i += 32) store_shared(shared + 512 + i * 2, b[i]);
  sync_warp();
  std::uint32_t fa[4], fb[2];
  load_matrix_x4(fa, shared + lane() % 16 * 32 + lane() / 16 * 16);
  load_matrix_x2(fb, shared + 512 + lane() % 8 * 32 + lane() / 8 % 2 * 16);
  float fd[4];
  const auto at = [&](unsigned i) { return (lane() / 4 + i / 2 * 8) * 8 + lane() % 4 * 2 + i % 2; };
  for (unsigned i = 0; i < 4; ++i) fd[i] = d[at(i)];
  mma_16x8x16<T>(fd, fa, fb);
  for (unsigned i = 0; i < 4; ++i) d[at(i)] = fd[i];
}

template <class T>
void test_multiply() {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<T> a(256), b(128);
  for (T& value : a) value = from_float<T>(normal(random));
  for (T& value : b) value = from_float<T>(normal(random));
  for (const Options& options : all_schedules()) {
    std::vector<float> d(128);
    std::iota(d.begin(), d.end(), -60.f);
    const LaunchConfig config{.block = {32}, .shared_bytes = 768};
    EXPECT_EQ(launch(multiply<T>, config, options, a.data(), b.data(), d.data()).text(), "");
    for (unsigned m = 0; m < 16; ++m) {
      for (unsigned n = 0; n < 8; ++n) {
        double sum = static_cast<double>(m * 8 + n) - 60, size = std::abs(sum);
        for (unsigned k = 0; k < 16; ++k) {
          const double product = double{to_float(a[m * 16 + k])} * to_float(b[n * 16 + k]);
          sum += product;
          size += std::abs(product);
        }
        EXPECT_NEAR(d[m * 8 + n], sum, size * 16 * 0x1p-24);
      }
    }
  }
}

TEST(Sim, MultiplyBf16) { test_multiply<bf16>(); }
TEST(Sim, MultiplyF16) { test_multiply<f16>(); }

}  // namespace
}  // namespace toppings::sim
