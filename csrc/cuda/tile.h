// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

// The two sizes of a block's tile, and where things lie in its shared memory. Plain C++: the host's
// choice of a tile needs the same numbers.
namespace toppings::cuda {

// Up to so many tokens every block makes the plan itself, in shared memory.
inline constexpr int kSmallBatch = 256;

// Projections in one launch; more take more launches.
inline constexpr int kMaxProjections = 8;

// At most so many token tiles in a launch, each with a counter.
inline constexpr std::int32_t kMaxTiles = 32 * 1024;

// The counters lie at the begin of the workspace: ticket, blocks that ended, one for each tile.
inline constexpr std::int64_t kCountersBytes = (2 + kMaxTiles) * std::int64_t{4};

// A row of a stage of x, A or v: 32 numbers of 4 bytes or 64 of 2.
inline constexpr int kLineBytes = 128;

// Rank rows are taken in groups of 8, the width of an mma: what a rank is rounded up to, in
// registers and in the workspace only.
inline constexpr int kRankGroup = 8;

// Parts of the sums along K at most; config.h.
inline constexpr int kMaxParts = 4;

// Rank rows of B in a stage of expand.
inline constexpr int kRankStep = 32;

// Few tokens to an adapter: many small blocks, so that enough bytes of weights are in flight.
struct NarrowTile {
  static constexpr int kTokens = 16;
  static constexpr int kRanks = 64;         // rank rows of A, of all projections together
  static constexpr int kColumnBytes = 512;  // of a row of B and y
  static constexpr int kStages = 4;         // of x and A
  static constexpr int kTokenWarps = 1, kColumnWarps = 4;
  static constexpr int kPartLanes = kMaxParts;  // parts of v that are summed side by side
  static constexpr int kPlanesAtOnce = 2;       // of v, on their way to registers
  static constexpr int kBlocks = 4;  // to a multiprocessor; bounds registers and shared memory
};

// Many tokens to an adapter: large tiles, so that weights and x are read from L2 seldom.
struct WideTile {
  static constexpr int kTokens = 64;
  static constexpr int kRanks = 64;
  static constexpr int kColumnBytes = 256;
  static constexpr int kStages = 4;
  static constexpr int kTokenWarps = 2, kColumnWarps = 4;
  static constexpr int kPartLanes = 1, kPlanesAtOnce = 2;
  static constexpr int kBlocks = 2;
};

template <class Tile>
inline constexpr int kThreads = 32 * Tile::kTokenWarps * Tile::kColumnWarps;

struct RankGroup {
  const void* a;        // its first row of A
  std::int32_t rows;    // 1 to 8
  std::int32_t column;  // where it begins in a row of v
};

// What there is to do in a launch. In shared memory: in registers it would take them from the
// products.
struct Work {
  const std::int32_t* tokens;  // of the plan
  const std::int32_t* begins;
  std::int32_t window_begin, window_end;
  std::int32_t first_segment, last_segment;  // in the window: [first, last)
  std::int32_t tiles;
  std::int32_t rank_splits, shrinks_per_tile, expands_per_tile;
};

// The small things in shared memory, before the stages.
template <class Tile>
struct alignas(128) Scratch {
  std::int32_t tokens[Tile::kTokens];     // of the tile; -1 beyond its end
  std::int32_t exponents[Tile::kTokens];  // by which the rows of v were scaled; expand.cuh
  RankGroup groups[Tile::kRanks / kRankGroup];
  Work work;
  std::uint32_t ticket;
  std::int32_t plan[2 * kSmallBatch + 2];
};

template <class Tile>
inline constexpr int kShrinkStageBytes = (Tile::kTokens + Tile::kRanks) * kLineBytes;

template <class Tile>
inline constexpr int kExpandStageBytes =
    kRankStep * Tile::kColumnBytes + Tile::kTokens * kLineBytes;

template <class Tile>
inline constexpr int kSharedBytes =
    static_cast<int>(sizeof(Scratch<Tile>)) +
    std::max(Tile::kStages * kShrinkStageBytes<Tile>,
             2 * kExpandStageBytes<Tile> + Tile::kTokens * Tile::kColumnBytes);

}  // namespace toppings::cuda
