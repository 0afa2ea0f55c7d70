// SPDX-License-Identifier: Apache-2.0
#include "cuda/config.h"

#include <algorithm>
#include <type_traits>

#include "cuda/tile.h"

namespace toppings::cuda {
namespace {

// Beyond these counts v is summed by parts inside a block: its planes would cost more than the
// tiles' missing parallelism.
constexpr std::int64_t kTokensInChunks = 1024;
constexpr std::int64_t kMaxChunks = 32;

// Items are counted in 32 bits.
constexpr std::int64_t kMaxItems = std::int64_t{1} << 30;

// Planes of v beyond this are not kept: more tokens take more launches.
constexpr std::int64_t kMaxVBytes = std::int64_t{64} << 20;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

template <class Tile>
std::int64_t column_tiles(const Problem& problem) {
  const std::int64_t columns = Tile::kColumnBytes / problem.math_bytes;
  std::int64_t sum = 0;
  for (const std::int64_t width : problem.widths) sum += ceil_div(width, columns);
  return sum;
}

}  // namespace

Summation summation(std::int64_t in) {
  // A chunk is a whole number of stages; at 256 a stage pipeline of a narrow tile holds one.
  const std::int64_t chunk = std::max<std::int64_t>(256, round_up(ceil_div(in, kMaxChunks), 64));
  const std::int64_t chunks = ceil_div(in, chunk);
  const std::int64_t per_part = std::max<std::int64_t>(1, ceil_div(chunks, kMaxParts));
  return {.chunk = static_cast<std::int32_t>(chunk),
          .chunks = static_cast<std::int32_t>(chunks),
          .chunks_per_part = static_cast<std::int32_t>(per_part),
          .parts = static_cast<std::int32_t>(ceil_div(chunks, per_part))};
}

Config choose(const Problem& problem, const Gpu& gpu) {
  const Summation sums = summation(problem.in);
  const bool by_part = problem.tokens > kTokensInChunks;
  Config config{};
  config.wide = problem.tokens > kSmallBatch;
  config.units = by_part ? sums.parts : sums.chunks;
  config.chunks_per_unit = by_part ? sums.chunks_per_part : 1;
  config.planes_per_part = by_part ? 1 : sums.chunks_per_part;
  config.wanted_items = 2 * gpu.multiprocessors;
  config.v_columns = round_up(problem.max_rank, kRankGroup);

  const std::int64_t token_bytes =
      config.units * problem.num_projections * config.v_columns * std::int64_t{sizeof(float)};
  const std::int64_t tile_tokens = config.wide ? WideTile::kTokens : NarrowTile::kTokens;
  const std::int64_t rank_tiles = ceil_div(problem.num_projections * config.v_columns,
                                           config.wide ? WideTile::kRanks : NarrowTile::kRanks);
  const std::int64_t columns =
      config.wide ? column_tiles<WideTile>(problem) : column_tiles<NarrowTile>(problem);
  const std::int64_t tile_items = config.units * rank_tiles + std::max<std::int64_t>(columns, 1);

  // A window of n tokens has at most n / tile_tokens tiles, and one more for each segment.
  const std::int64_t most_tiles = std::min<std::int64_t>(kMaxTiles, kMaxItems / tile_items);
  const std::int64_t fitting = token_bytes == 0 ? problem.tokens : kMaxVBytes / token_bytes;
  config.window = std::min(
      {problem.tokens, std::max(tile_tokens, fitting), std::max<std::int64_t>(1, most_tiles / 2)});
  const std::int64_t tiles =
      config.window / tile_tokens + std::min(config.window, problem.num_slots);
  // Ranks are split while items are wanted, so no block more than these finds work; each one costs
  // three atomics at one address.
  const std::int64_t units = tiles * config.units;
  const std::int64_t items =
      std::min(units * rank_tiles, std::max<std::int64_t>(units, config.wanted_items)) +
      tiles * std::max<std::int64_t>(columns, 1);
  const std::int64_t resident =
      std::int64_t{gpu.multiprocessors} * (config.wide ? gpu.wide_blocks : gpu.narrow_blocks);
  config.blocks = std::clamp<std::int64_t>(items, 1, resident);

  // The counters' place is the same in every call: they are 0 between calls, the rest isn't.
  config.plan_begin = round_up(kCountersBytes, 256);
  config.v_begin = round_up(
      config.plan_begin + (2 * problem.tokens + 2) * std::int64_t{sizeof(std::int32_t)}, 256);
  config.workspace = config.v_begin + config.window * token_bytes;
  return config;
}

}  // namespace toppings::cuda
