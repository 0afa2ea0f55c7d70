// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <cstdio>

#include "lora_problem.h"

// What the kernels read and write, against what they must: docs/kernels.md has the model. Addresses
// don't depend on the GPU, so this is what one would count.
namespace toppings::sim {
namespace {

constexpr double kSector = 32;

struct Model {
  double reads, writes;  // distinct sectors
};

// x and y of tokens with an adapter, the weights of each adapter in use once, and v: in as many
// planes as the kernels keep, or once and unpadded, which is the least that two phases can do.
enum class V { planes, once };
Model model_of(const Problem& problem, V v = V::planes) {
  const Case& c = problem.data;
  const double size = static_cast<double>(size_of(c.dtype));
  Model bytes{};
  std::vector<bool> used(c.ranks.size());
  for (const std::int32_t slot : problem.token_slots) {
    if (!problem.has_adapter(slot)) continue;
    bytes.reads += static_cast<double>(c.in) * size;
    for (std::size_t s = 0; s < c.widths.size(); ++s) {
      const auto r = static_cast<double>(problem.rank(static_cast<std::int64_t>(s), slot));
      const auto width = static_cast<double>(c.widths[s]);
      const double numbers =
          v == V::once ? r : problem.config().units * ((r + 7) - std::fmod(r + 7, 8));
      bytes.reads += numbers * 4 + (r > 0 ? width * size : 0);
      bytes.writes += numbers * 4 + (r > 0 ? width * size : 0);
      if (!used[static_cast<std::size_t>(slot)]) {
        bytes.reads += r * (static_cast<double>(c.in) + width) * size;
      }
    }
    used[static_cast<std::size_t>(slot)] = true;
  }
  return {bytes.reads / kSector, bytes.writes / kSector};
}

enum class Kind { decode, prefill };

void expect_near_model(const Case& data, bool wide, Kind kind) {
  SCOPED_TRACE(data.text() + (wide ? " wide" : " narrow"));
  Problem problem(data);
  problem.adjust = [&](cuda::Config& config) { config.wide = wide; };
  const Report report = problem.run(Operator::forward, {});
  ASSERT_TRUE(report.ok()) << report.text();
  const Model model = model_of(problem);
  const auto line = [](const char* name, const GlobalTraffic& got, double want) {
    std::printf("  %s: %lld requests, %lld sectors, %lld distinct, %.0f in the model\n", name,
                static_cast<long long>(got.requests), static_cast<long long>(got.sectors),
                static_cast<long long>(got.distinct_sectors), want);
    EXPECT_LE(static_cast<double>(got.distinct_sectors), 1.15 * want) << name;
  };
  std::printf("%s%s\n", data.text().c_str(), wide ? " wide" : " narrow");
  line("reads", report.global_loads, model.reads);
  line("writes", report.global_stores, model.writes);
  const Model strict = model_of(problem, V::once);
  const auto got = static_cast<double>(report.global_loads.distinct_sectors +
                                       report.global_stores.distinct_sectors);
  const double ratio = got / (strict.reads + strict.writes);
  std::printf("  both: %.3f of the model, %.3f of the one with v once\n",
              got / (model.reads + model.writes), ratio);
  if (kind == Kind::decode) {
    EXPECT_LE(ratio, 1.15);
  }
  const auto conflicts = [](const char* name, const SharedTraffic& got) {
    std::printf("  shared %s: %lld requests, %lld wavefronts, %lld without conflicts\n", name,
                static_cast<long long>(got.requests), static_cast<long long>(got.wavefronts),
                static_cast<long long>(got.ideal_wavefronts));
    EXPECT_LE(static_cast<double>(got.wavefronts), 1.05 * static_cast<double>(got.ideal_wavefronts))
        << name;
  };
  conflicts("loads", report.shared_loads);
  conflicts("stores", report.shared_stores);
  conflicts("copies", report.shared_copies);
}

std::vector<std::int32_t> one_adapter_each(std::int32_t tokens) {
  std::vector<std::int32_t> slots;
  for (std::int32_t t = 0; t < tokens; ++t) slots.push_back(t);
  return slots;
}

TEST(Traffic, IsWhatTheModelSays) {
  for (const DType dtype : {DType::bf16, DType::f16, DType::f32}) {
    const Case decode{.tokens = 16,
                      .in = 1024,
                      .widths = {512, 256, 256},
                      .dtype = dtype,
                      .a_dtype = dtype,
                      .b_dtype = dtype,
                      .ranks = std::vector<std::int64_t>(16, 16),
                      .token_slots = one_adapter_each(16),
                      .aligned = true};
    Case shared = decode;  // by four adapters
    for (auto& slot : shared.token_slots) slot %= 4;
    shared.ranks = {64, 8, 16, 24};
    Case prefill = decode;
    prefill.tokens = 200;
    prefill.ranks = {16, 64};
    prefill.token_slots.assign(200, 0);
    for (int t = 0; t < 70; ++t) prefill.token_slots[static_cast<std::size_t>(t)] = 1;
    for (const bool wide : {false, true}) {
      expect_near_model(decode, wide, Kind::decode);
      expect_near_model(shared, wide, Kind::decode);
      expect_near_model(prefill, wide, Kind::prefill);
    }
  }
}

// As many planes as an 8B model's q, k and v have.
TEST(Traffic, OfDecodeWithSixteenPlanes) {
  expect_near_model({.tokens = 4,
                     .in = 4096,
                     .widths = {4096, 1024, 1024},
                     .ranks = std::vector<std::int64_t>(4, 16),
                     .token_slots = one_adapter_each(4),
                     .aligned = true},
                    false, Kind::decode);
}

// Odd rows cost requests, not sectors.
TEST(Traffic, OfOddRows) {
  Problem problem(
      {.tokens = 5, .in = 577, .widths = {333}, .ranks = {7, 16}, .token_slots = {0, 1, 0, 1, 0}});
  const Report report = problem.run(Operator::forward, {});
  ASSERT_TRUE(report.ok()) << report.text();
  const Model model = model_of(problem);
  EXPECT_LE(static_cast<double>(report.global_loads.distinct_sectors), 1.15 * model.reads);
  EXPECT_LE(static_cast<double>(report.global_stores.distinct_sectors), 1.25 * model.writes);
}

}  // namespace
}  // namespace toppings::sim
