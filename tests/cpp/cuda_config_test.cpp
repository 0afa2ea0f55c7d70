// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/config.h"
#include "cuda/tile.h"

namespace toppings::cuda {
namespace {

constexpr Gpu kH100{.multiprocessors = 132, .narrow_blocks = 4, .wide_blocks = 2};
const std::vector<std::int64_t> kQkv = {4096, 1024, 1024};

Problem problem_of(std::int64_t tokens, std::int64_t slots, std::int64_t max_rank) {
  return {.tokens = tokens,
          .num_slots = slots,
          .num_projections = 3,
          .in = 4096,
          .widths = kQkv,
          .max_rank = max_rank,
          .math_bytes = 2};
}

TEST(Summation, CoversKOnceInAtMost32Chunks) {
  for (std::int64_t in = 1; in < 70000; in = in * 5 / 4 + 1) {
    const Summation sums = summation(in);
    EXPECT_EQ(sums.chunk % 64, 0) << in;
    EXPECT_GE(std::int64_t{sums.chunk} * sums.chunks, in);
    EXPECT_LT(std::int64_t{sums.chunk} * (sums.chunks - 1), in);
    EXPECT_LE(sums.chunks, 32) << in;
    EXPECT_LE(sums.parts, 4) << in;
    EXPECT_GE(sums.parts * sums.chunks_per_part, sums.chunks);
    EXPECT_LT((sums.parts - 1) * sums.chunks_per_part, sums.chunks);
  }
}

TEST(Summation, OfTheWidthsOfModels) {
  EXPECT_EQ(summation(4096).chunks, 16);
  EXPECT_EQ(summation(4096).parts, 4);
  EXPECT_EQ(summation(14336).chunks, 32);
  EXPECT_EQ(summation(1).chunks, 1);
}

TEST(Config, TakesNarrowTilesForFewTokens) {
  EXPECT_FALSE(choose(problem_of(1, 64, 512), kH100).wide);
  EXPECT_FALSE(choose(problem_of(kSmallBatch, 64, 512), kH100).wide);
  EXPECT_TRUE(choose(problem_of(kSmallBatch + 1, 64, 512), kH100).wide);
}

TEST(Config, SumsByPartsOnlyWhereTilesFillTheGpu) {
  EXPECT_EQ(choose(problem_of(64, 64, 64), kH100).units, 16);
  const Config config = choose(problem_of(4096, 64, 64), kH100);
  EXPECT_EQ(config.units, 4);
  EXPECT_EQ(config.chunks_per_unit, 4);
  EXPECT_EQ(config.planes_per_part, 1);
}

TEST(Config, NeverLaunchesMoreBlocksThanAreResident) {
  for (const std::int64_t tokens : {1, 16, 256, 257, 8192}) {
    const Config config = choose(problem_of(tokens, 64, 64), kH100);
    EXPECT_GE(config.blocks, 1);
    EXPECT_LE(config.blocks, 132 * (config.wide ? 2 : 4));
  }
  // No more than there are items: 16 chunks x 16 splits of the ranks, and 24 ranges of columns.
  EXPECT_EQ(choose(problem_of(1, 64, 512), kH100).blocks, 264 + 24);
  EXPECT_EQ(choose(problem_of(1, 64, 16), kH100).blocks, 16 + 24);
  const std::vector<std::int64_t> one = {8};
  const Config small = choose({.tokens = 1,
                               .num_slots = 1,
                               .num_projections = 1,
                               .in = 8,
                               .widths = one,
                               .max_rank = 8,
                               .math_bytes = 2},
                              kH100);
  EXPECT_LE(small.blocks, 2);
}

TEST(Config, KeepsWorkspaceAndCountersBounded) {
  for (const std::int64_t tokens : {1, 256, 5000, 100000, 5000000}) {
    for (const std::int64_t slots : {1, 1000, 1000000}) {
      for (const std::int64_t max_rank : {1, 64, 512}) {
        const Config config = choose(problem_of(tokens, slots, max_rank), kH100);
        const std::int64_t tile = config.wide ? WideTile::kTokens : NarrowTile::kTokens;
        EXPECT_GE(config.window, std::min(tokens, tile));
        EXPECT_LE(config.window, tokens);
        EXPECT_LE(config.window / tile + std::min(config.window, slots), kMaxTiles);
        EXPECT_GE(config.plan_begin, kCountersBytes);
        EXPECT_GE(config.v_begin, config.plan_begin + (2 * tokens + 2) * 4);
        EXPECT_EQ(config.v_begin % 256, 0);
        EXPECT_LE(config.workspace - config.v_begin, std::int64_t{64} << 20);
        EXPECT_EQ(config.workspace - config.v_begin,
                  config.window * config.units * 3 * config.v_columns * 4);
      }
    }
  }
}

// The counters must lie where they lay in any call before: they are what is 0 between calls.
TEST(Config, KeepsTheCountersPlace) {
  EXPECT_EQ(choose(problem_of(1, 1, 1), kH100).plan_begin,
            choose(problem_of(100000, 1000, 512), kH100).plan_begin);
}

TEST(Config, DoesNotDependOnTheGpuForTheWorkspace) {
  EXPECT_EQ(choose(problem_of(300, 9, 64), {1, 1, 1}).workspace,
            choose(problem_of(300, 9, 64), kH100).workspace);
}

TEST(Tiles, FitIntoSharedMemory) {
  constexpr int kA100 = 164 * 1024, kReserved = 1024;
  EXPECT_LE((kSharedBytes<WideTile> + kReserved) * WideTile::kBlocks, kA100);
  EXPECT_LE((kSharedBytes<NarrowTile> + kReserved) * 3, kA100);
  EXPECT_LE((kSharedBytes<NarrowTile> + kReserved) * NarrowTile::kBlocks, 227 * 1024);
}

}  // namespace
}  // namespace toppings::cuda
