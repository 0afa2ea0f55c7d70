// SPDX-License-Identifier: Apache-2.0
#include "cuda/forward.cuh"

#include <cstdio>
#include <random>
#include <string>

#include "lora_problem.h"

// All operators against float64, in all schedules: hostile shapes, every dtype, both tiles.
namespace toppings::sim {
namespace {

struct Shape {
  std::string name;
  Case data;
};

// Mostly odd sizes at odd places. Every shape runs with narrow and wide tiles.
std::vector<Shape> shapes() {
  return {
      {"Empty", {.tokens = 0}},
      {"One", {.tokens = 1, .in = 577, .widths = {33}, .ranks = {24}, .token_slots = {0}}},
      {"NoAdapter", {.tokens = 3, .ranks = {8}, .token_slots = {-1, -7, 1}}},
      {"RankOne", {.tokens = 2, .in = 1, .widths = {1, 2}, .ranks = {1}, .token_slots = {0, 0}}},
      {"Aligned",
       {.tokens = 7, .in = 256, .widths = {128, 64}, .ranks = {16, 8, 0, 64}, .aligned = true}},
      {"MixedRanks",
       {.tokens = 7, .in = 300, .widths = {130, 65}, .ranks = {0, 1, 3, 8, 16, 24, 64}}},
      {"Absent",
       {.tokens = 9, .in = 96, .widths = {64, 32, 32}, .ranks = {3, 8, 40}, .absent = true}},
      {"LargeRank", {.tokens = 3, .in = 65, .widths = {70}, .ranks = {130, 67}, .y_scale = 0}},
      {"RankBound", {.tokens = 5, .in = 100, .widths = {40, 24}, .ranks = {4, 9}, .max_rank = 512}},
      {"LongRows", {.tokens = 2, .in = 9001, .widths = {17}, .ranks = {9}, .token_slots = {0, 0}}},
      {"ManySlots",
       {.tokens = 40, .in = 64, .widths = {48}, .ranks = std::vector<std::int64_t>(99, 8)}},
      {"ManyProjections",
       {.tokens = 3, .in = 64, .widths = {8, 9, 10, 11, 12, 13, 14, 15, 16, 17}, .ranks = {3, 5}}},
      {"Shared", {.tokens = 70, .in = 130, .widths = {90}, .ranks = {12, 16}, .planned = true}},
  };
}

struct DTypes {
  DType x, a, b;
};
constexpr DTypes kDTypes[] = {
    {DType::bf16, DType::bf16, DType::bf16}, {DType::f16, DType::f16, DType::f16},
    {DType::f32, DType::f32, DType::f32},    {DType::bf16, DType::f32, DType::f32},
    {DType::f16, DType::bf16, DType::f32},   {DType::f32, DType::f16, DType::bf16}};

class ForwardTest : public ::testing::TestWithParam<std::tuple<int, int, bool>> {};

std::string name_of_test(const ::testing::TestParamInfo<ForwardTest::ParamType>& info) {
  const auto [shape, dtypes, wide] = info.param;
  const DTypes& d = kDTypes[dtypes];
  return shapes()[static_cast<std::size_t>(shape)].name + "_" + std::string(name_of(d.x)) + "_" +
         std::string(name_of(d.a)) + "_" + std::string(name_of(d.b)) + (wide ? "_wide" : "_narrow");
}

INSTANTIATE_TEST_SUITE_P(All, ForwardTest,
                         ::testing::Combine(::testing::Range(0, static_cast<int>(shapes().size())),
                                            ::testing::Range(0,
                                                             static_cast<int>(std::size(kDTypes))),
                                            ::testing::Bool()),
                         name_of_test);

TEST_P(ForwardTest, IsRight) {
  const auto [shape, dtypes, wide] = GetParam();
  Case data = shapes()[static_cast<std::size_t>(shape)].data;
  data.seed = static_cast<std::uint64_t>(shape * 16 + dtypes);
  data.dtype = kDTypes[dtypes].x;
  data.a_dtype = kDTypes[dtypes].a;
  data.b_dtype = kDTypes[dtypes].b;
  expect_right_everywhere(data, [wide = wide](cuda::Config& config) { config.wide = wide; });
}

// As a GPU gets them: the batch decides on the tile, and on the plan.
TEST(Prefill, SegmentsOfAnyLength) {
  for (const bool aligned : {false, true}) {
    expect_right_everywhere({.seed = 3,
                             .tokens = 300,
                             .in = 320,
                             .widths = {136, 72},
                             .ranks = {16, 8, 0, 64, 3},
                             .aligned = aligned},
                            [](cuda::Config&) {});
  }
}

// More segments than fit into shared memory.
TEST(Prefill, ManySegments) {
  Problem problem({.seed = 6,
                   .tokens = 900,
                   .in = 20,
                   .widths = {8},
                   .ranks = std::vector<std::int64_t>(800, 2)});
  expect_right(problem, Operator::forward, {.order = Order::random});
  problem.adjust = [](cuda::Config& config) { config.window = 200; };
  expect_right(problem, Operator::forward, {});
}

TEST(Prefill, WindowsOfTokens) {
  Problem problem({.seed = 4, .tokens = 300, .in = 64, .widths = {40}, .ranks = {16, 8, 3}});
  problem.adjust = [](cuda::Config& config) { config.window = 77; };
  for (const Operator op : {Operator::forward, Operator::shrink, Operator::expand}) {
    expect_right(problem, op, {});
  }
}

// fp16 has 5 bits of exponent; v needs more.
TEST(Fp16, SmallAndLargeV) {
  for (const double size : {1e-4, 1e5}) {
    Problem problem({.seed = 5,
                     .tokens = 3,
                     .in = 64,
                     .widths = {24},
                     .dtype = DType::f16,
                     .a_dtype = DType::f16,
                     .b_dtype = DType::f16,
                     .ranks = {40},
                     .token_slots = {0, 0, 0},
                     .y_scale = 0,
                     .v_scale = size});
    expect_right(problem, Operator::expand, {});
  }
}

// All shrink items, a rank that grows, all expand items: by one block, which would wait for ever if
// what it waits for depended on ranks.
TOPPINGS_KERNEL changing_kernel(cuda::LoraParams p, std::int64_t* rank, std::int64_t new_rank) {
  using Tile = cuda::NarrowTile;
  auto& scratch = *reinterpret_cast<cuda::Scratch<Tile>*>(cuda::dynamic_shared());
  std::byte* stages = cuda::dynamic_shared() + sizeof(cuda::Scratch<Tile>);
  cuda::make_small_plan(p, reinterpret_cast<std::int32_t*>(stages), scratch.plan);
  const bool leads = cuda::thread_index().x == 0;
  if (leads) {
    cuda::find_work<cuda::bf16, Tile>(p, scratch.plan, scratch.plan + 1 + p.tokens, scratch.work);
  }
  cuda::sync_block();
  for (std::uint32_t i = 0; i < cuda::all_items(scratch.work); ++i) {
    if (leads && i == cuda::shrink_items(scratch.work)) *rank = new_rank;
    cuda::sync_block();
    cuda::do_item<cuda::bf16>(p, i, scratch, stages);
    cuda::sync_block();
  }
}

TEST(RankChanges, DuringALaunchWithoutAHang) {
  Problem problem({.tokens = 2, .in = 300, .widths = {40}, .ranks = {200}, .token_slots = {0, 0}});
  ASSERT_TRUE(problem.run(Operator::forward, {}).ok());  // y is there
  const cuda::Call call = problem.call(Operator::forward);
  cuda::Config config = cuda::choose(cuda::problem_of(call), problem.gpu);
  config.wanted_items = 1000;
  std::vector<Line> workspace(static_cast<std::size_t>(config.workspace) / sizeof(Line) + 1);
  auto* rank = const_cast<std::int64_t*>(call.args.batch.slots) + 2;
  *rank = 8;
  cuda::LoraParams params = cuda::params_of(call, config, workspace.data()->bytes);
  params.window_end = params.tokens;
  std::vector<Memory> memory = problem.memory();
  memory.push_back({workspace.data(), workspace.size() * sizeof(Line), "workspace"});
  const Report report = launch(changing_kernel,
                               {.grid = {1},
                                .block = {cuda::kThreads<cuda::NarrowTile>},
                                .shared_bytes = cuda::kSharedBytes<cuda::NarrowTile>},
                               {.memory = memory}, params, rank, std::int64_t{200});
  EXPECT_TRUE(report.ok()) << report.text();
}

TEST(FreshSeeds, AreRight) {
  std::random_device device;
  for (int i = 0; i < 12; ++i) {
    const std::uint64_t seed = device();
    std::mt19937_64 random(seed);
    const auto up_to = [&](std::uint64_t n) { return static_cast<std::int64_t>(random() % n) + 1; };
    Case data{.seed = seed, .tokens = up_to(40), .in = up_to(600), .widths = {up_to(300)}};
    if (random() % 2 == 0) data.widths.push_back(up_to(200));
    data.ranks.clear();
    for (std::int64_t n = up_to(6); n > 0; --n) data.ranks.push_back(up_to(70) - 1);
    data.aligned = random() % 2 == 0;
    const DTypes& dtypes = kDTypes[random() % std::size(kDTypes)];
    data.dtype = dtypes.x;
    data.a_dtype = dtypes.a;
    data.b_dtype = dtypes.b;
    const bool wide = random() % 2 == 0;
    std::printf("%s%s\n", data.text().c_str(), wide ? " wide" : "");
    if (!expect_right_everywhere(data, [&](cuda::Config& config) { config.wide = wide; })) return;
  }
}

}  // namespace
}  // namespace toppings::sim
