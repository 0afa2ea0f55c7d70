// SPDX-License-Identifier: Apache-2.0
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "cuda/ptx.cuh"
#include "lora_problem.h"

// A row's bits depend on its own inputs alone: not on the tile, the batch, the schedule, how the
// work is split or where things lie.
namespace toppings::sim {
namespace {

constexpr Operator kOperators[] = {Operator::forward, Operator::shrink, Operator::expand};
constexpr DType kDTypes[] = {DType::bf16, DType::f16, DType::f32};

Case case_of(DType dtype) {
  return {.seed = 11,
          .tokens = 45,
          .in = 2100,  // nine chunks in three parts
          .widths = {70, 33},
          .dtype = dtype,
          .a_dtype = dtype,
          .b_dtype = dtype,
          .ranks = {0, 3, 16, 72},
          .planned = true};
}

std::vector<std::vector<float>> result(Problem& problem, Operator op, const Options& options = {}) {
  const Report report = problem.run(op, options);
  EXPECT_TRUE(report.ok()) << report.text();
  return problem.rows(op);
}

// NaN never appears in results, so == compares bits, but for the sign of 0.
void expect_same(const std::vector<std::vector<float>>& one,
                 const std::vector<std::vector<float>>& other) {
  ASSERT_EQ(one.size(), other.size());
  for (std::size_t t = 0; t < one.size(); ++t) {
    ASSERT_EQ(one[t].size(), other[t].size());
    ASSERT_EQ(std::memcmp(one[t].data(), other[t].data(), one[t].size() * sizeof(float)), 0)
        << "row " << t;
  }
}

TEST(Determinism, TilesAndSplits) {
  for (const DType dtype : kDTypes) {
    Problem problem(case_of(dtype));
    const cuda::Summation sums = cuda::summation(problem.data.in);
    ASSERT_EQ(sums.chunks, 9);
    ASSERT_EQ(sums.parts, 3);
    for (const Operator op : kOperators) {
      const auto want = result(problem, op);
      for (const bool wide : {false, true}) {
        for (const bool by_part : {false, true}) {
          for (const int wanted_items : {1, 1000}) {
            SCOPED_TRACE(std::string(name_of(dtype)) + (wide ? " wide" : " narrow") +
                         (by_part ? " by part" : " by chunk"));
            problem.adjust = [&](cuda::Config& config) {
              config.wide = wide;
              config.wanted_items = wanted_items;
              if (by_part && config.units > 1) {
                config.units = sums.parts;
                config.chunks_per_unit = sums.chunks_per_part;
                config.planes_per_part = 1;
              }
            };
            expect_same(result(problem, op), want);
          }
        }
      }
    }
  }
}

TEST(Determinism, SchedulesAndBlocks) {
  Problem problem(case_of(DType::bf16));
  for (const Operator op : kOperators) {
    const auto want = result(problem, op);
    for (const Options& options : all_schedules(3)) expect_same(result(problem, op, options), want);
    for (const std::int64_t blocks : {1, 2, 17}) {
      problem.adjust = [&](cuda::Config& config) { config.blocks = blocks; };
      expect_same(result(problem, op), want);
    }
  }
}

TEST(Determinism, Permutation) {
  for (const DType dtype : kDTypes) {
    Case data = case_of(dtype);
    data.planned = false;
    Problem problem(data);
    std::vector<std::int32_t> order(static_cast<std::size_t>(data.tokens));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937_64(5));
    Problem other = problem.permuted(order);
    for (const Operator op : {Operator::forward, Operator::shrink}) {
      auto want = result(problem, op);
      std::vector<std::vector<float>> permuted;
      for (const std::int32_t from : order)
        permuted.push_back(want[static_cast<std::size_t>(from)]);
      expect_same(result(other, op), permuted);
    }
  }
}

// A token gets the same bits alone, with others of its adapter and among strangers.
TEST(Determinism, OtherTokens) {
  Case data = case_of(DType::bf16);
  data.planned = false;
  Problem problem(data);
  const auto want = result(problem, Operator::forward);
  const auto all = problem.token_slots;
  for (std::size_t t = 0; t < all.size(); t += 7) {
    problem.token_slots.assign(all.size(), -1);
    problem.token_slots[t] = all[t];
    const auto got = result(problem, Operator::forward);
    expect_same({got[t]}, {want[t]});
  }
}

// Rows of x and y 4 GiB apart, blocks of weights as far from the storage's begin.
TEST(Offsets, Have64Bits) {
  Problem problem({.seed = 12,
                   .tokens = 3,
                   .in = 70,
                   .widths = {50},
                   .ranks = {5, 9},
                   .token_slots = {1, 0, 1}});
  const auto want = result(problem, Operator::forward);
  cuda::Call call = problem.call(Operator::forward);
  LoraForward& args = call.args;
  constexpr std::int64_t kStride = (std::int64_t{1} << 31) + 8;
  constexpr std::size_t kBytes = 3 * kStride * 2;
  const auto reserve = [] {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    EXPECT_NE(memory, MAP_FAILED);
    return static_cast<std::byte*>(memory);
  };
  std::byte* x = reserve();
  std::byte* y = reserve();
  const Numbers& before = problem.y_before();
  for (std::int64_t t = 0; t < 3; ++t) {
    std::memcpy(x + t * kStride * 2, static_cast<const std::byte*>(args.x) + t * args.x_stride * 2,
                70 * 2);
    std::memcpy(y + t * kStride * 2, before.data() + t * args.y_stride * 2, 50 * 2);
  }
  std::vector<std::int64_t> slots(args.batch.slots, args.batch.slots + 2 * 3);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (i % 3 < 2) slots[i] += kStride;
  }
  const auto shifted = [](const void* data) {
    return reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(data) - kStride * 2);
  };
  std::vector<Memory> memory = problem.memory();
  memory.push_back({x, kBytes, "far x"});
  memory.push_back({y, kBytes, "far y"});
  memory.push_back({slots.data(), slots.size() * 8, "far slots"});
  args.x = x;
  args.y = y;
  args.x_stride = args.y_stride = kStride;
  args.a = shifted(args.a);
  args.b = shifted(args.b);
  args.batch.slots = slots.data();
  for (const bool wide : {false, true}) {
    for (std::int64_t t = 0; t < 3; ++t) {
      std::memcpy(y + t * kStride * 2,
                  before.data() + t * problem.call(Operator::forward).args.y_stride * 2, 50 * 2);
    }
    problem.adjust = [&](cuda::Config& config) { config.wide = wide; };
    const Report report = problem.run(call, {.memory = memory});
    EXPECT_TRUE(report.ok()) << report.text();
    for (std::size_t t = 0; t < 3; ++t) {
      for (std::size_t n = 0; n < 50; ++n) {
        cuda::bf16 number;
        std::memcpy(&number, y + (t * kStride + n) * 2, 2);
        ASSERT_EQ(cuda::to_float(number), want[t][n]) << t << ' ' << n;
      }
    }
  }
  munmap(x, kBytes);
  munmap(y, kBytes);
}

}  // namespace
}  // namespace toppings::sim
