// SPDX-License-Identifier: Apache-2.0
#include "cuda/plan.cuh"

#include <gtest/gtest.h>
#include <toppings/lora_plan.h>

#include <numeric>
#include <random>
#include <vector>

#include "cuda/plan_kernel.cuh"
#include "sim.h"

// The plan made on the GPU, by both kernels that make one, is the one made on the CPU; and its
// tiles hold every token once.
namespace toppings::sim {
namespace {

std::vector<std::int32_t> random_slots(std::int64_t tokens, std::int64_t num_slots, double alone,
                                       std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<double> uniform;
  std::uniform_int_distribution<std::int64_t> any(-2, num_slots);
  std::vector<std::int32_t> slots;
  while (static_cast<std::int64_t>(slots.size()) < tokens) {
    const std::int64_t slot = uniform(random) < alone || slots.empty() ? any(random) : slots.back();
    slots.push_back(static_cast<std::int32_t>(slot));
  }
  return slots;
}

std::vector<std::int32_t> expected_plan(std::vector<std::int32_t> slots, std::int64_t num_slots) {
  for (std::int32_t& slot : slots) slot = slot >= 0 && slot < num_slots ? slot : -1;
  const auto tokens = static_cast<std::int64_t>(slots.size());
  std::vector<std::int32_t> plan(static_cast<std::size_t>(lora_plan_size(tokens, num_slots)));
  lora_plan(slots.data(), tokens, num_slots, plan.data());
  return plan;
}

TEST(PlanKernel, MakesThePlanOfTheCpu) {
  struct Sizes {
    std::int64_t tokens, num_slots;
    double alone;
  };
  for (const Sizes& s : {Sizes{0, 3, 1},
                         {1, 1, 1},
                         {5, 0, 1},
                         {40, 7, 1},
                         {700, 3, 0.1},
                         {600, 256, 1},
                         {1500, 257, 0.5},
                         {900, 70000, 1},
                         {513, 20000000, 1}}) {
    const auto slots = random_slots(s.tokens, s.num_slots, s.alone, 7);
    for (const Options& schedule : all_schedules(1)) {
      std::vector<std::int32_t> plan(static_cast<std::size_t>(2 * s.tokens + 2), 0x7fffffff);
      Options options = schedule;
      options.memory = {{slots.data(), slots.size() * 4, "token_slots"},
                        {plan.data(), plan.size() * 4, "plan"}};
      const Report report = launch(cuda::plan_kernel, cuda::plan_launch(), options,
                                   cuda::PlanParams{.token_slots = slots.data(),
                                                    .plan = plan.data(),
                                                    .num_slots = s.num_slots,
                                                    .tokens = static_cast<std::int32_t>(s.tokens)});
      ASSERT_TRUE(report.ok()) << report.text();
      auto want = expected_plan(slots, s.num_slots);
      ASSERT_EQ(plan, want) << s.tokens << ' ' << s.num_slots << ' ' << name_of(options);
    }
  }
}

// A kernel's worth of make_small_plan; the plan comes out in global memory.
TOPPINGS_KERNEL small_plan_kernel(cuda::LoraParams p, std::int32_t* out) {
  auto* scratch = reinterpret_cast<std::int32_t*>(cuda::dynamic_shared());
  std::int32_t* plan = scratch + 2 * cuda::kSmallBatch;
  cuda::make_small_plan(p, scratch, plan);
  const auto segments = plan[0];
  for (auto i = static_cast<std::int32_t>(cuda::thread_index().x); i < 2 * p.tokens + 2; i += 128) {
    const std::int32_t count = plan[1 + p.tokens + segments];
    const bool is_used = i <= count || (i > p.tokens && i <= p.tokens + 1 + segments);
    cuda::store_global(out + i, is_used ? plan[i] : -1);
  }
}

TEST(SmallPlan, IsThePlanOfTheCpu) {
  for (const std::int64_t tokens : {0, 1, 2, 31, 64, 129, 256}) {
    for (const std::int64_t num_slots : {1, 5, 1000}) {
      const auto slots = random_slots(tokens, num_slots, 0.6, 9);
      const auto want = expected_plan(slots, num_slots);
      for (const Options& options : all_schedules(1)) {
        cuda::LoraParams params{};
        params.token_slots = slots.data();
        params.num_slots = num_slots;
        params.tokens = static_cast<std::int32_t>(tokens);
        std::vector<std::int32_t> plan(want.size());
        const Report report =
            launch(small_plan_kernel,
                   {.grid = {1},
                    .block = {128},
                    .shared_bytes = (4 * cuda::kSmallBatch + 2) * sizeof(std::int32_t)},
                   options, params, plan.data());
        ASSERT_TRUE(report.ok()) << report.text();
        ASSERT_EQ(plan, want) << tokens << ' ' << num_slots << ' ' << name_of(options);
      }
    }
  }
}

TEST(Tiles, HoldEveryTokenOfTheWindowOnce) {
  for (std::uint64_t seed = 0; seed < 200; ++seed) {
    std::mt19937_64 random(seed);
    const auto tokens = static_cast<std::int64_t>(random() % 300);
    const auto num_slots = static_cast<std::int64_t>(random() % 40) + 1;
    const auto slots = random_slots(tokens, num_slots, seed % 2 == 0 ? 1 : 0.1, seed);
    const auto plan = expected_plan(slots, num_slots);
    const std::int32_t listed = plan[static_cast<std::size_t>(1 + tokens + plan[0])];
    cuda::LoraParams params{};
    params.tokens = static_cast<std::int32_t>(tokens);
    params.window_begin = static_cast<std::int32_t>(random() % 50);
    params.window_end = params.window_begin + static_cast<std::int32_t>(random() % 300);
    cuda::Work work{};
    cuda::find_tiles<16>(params, plan.data(), plan.data() + 1 + tokens, work);
    const std::int32_t window = std::max(params.window_end - params.window_begin, 1);
    EXPECT_LE(work.tiles, window / 16 + std::min<std::int64_t>(window, num_slots));
    std::vector<int> seen(static_cast<std::size_t>(tokens));
    for (std::int32_t number = 0; number < work.tiles; ++number) {
      const cuda::TokenTile tile = cuda::tile_of<16>(work, number);
      for (std::int32_t i = tile.first; i < tile.first + tile.count; ++i) {
        ++seen[static_cast<std::size_t>(i)];
        EXPECT_EQ(slots[static_cast<std::size_t>(work.tokens[i])],
                  slots[static_cast<std::size_t>(work.tokens[tile.first])]);
      }
    }
    for (std::int32_t i = 0; i < tokens; ++i) {
      const bool inside = i >= params.window_begin && i < params.window_end && i < listed;
      ASSERT_EQ(seen[static_cast<std::size_t>(i)], inside ? 1 : 0) << seed << ' ' << i;
    }
  }
}

// A plan of another batch: its tiles must not reach beyond the counters.
TEST(Tiles, OfAStalePlanHaveCounters) {
  constexpr std::int32_t kMany = 1 << 20;
  cuda::LoraParams params{};
  params.window_end = 1 << 30;
  for (const auto& [last, tiles] : {std::pair{1 << 30, cuda::kMaxTiles}, {-kMany, 0}, {64, 5}}) {
    const std::vector<std::int32_t> plan = {1, 0, last};
    cuda::Work work{};
    cuda::find_tiles<16>(params, plan.data(), plan.data() + 1, work);
    EXPECT_EQ(work.tiles, tiles) << last;
  }
}

}  // namespace
}  // namespace toppings::sim
