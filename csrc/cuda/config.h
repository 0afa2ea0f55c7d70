// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>

// How a call is cut into launches, blocks and items: a function of sizes alone, without CUDA.
namespace toppings::cuda {

// The order of the sums along K, from K alone: chunks are summed one number after the other (16 at
// a time on tensor cores), then the chunks of a part, then the parts. Whoever sums them, whole or
// in planes, gets the same bits.
struct Summation {
  std::int32_t chunk;  // numbers
  std::int32_t chunks, chunks_per_part, parts;
};
Summation summation(std::int64_t in);

struct Problem {
  std::int64_t tokens, num_slots, num_projections;
  std::int64_t in;                       // 0: expand alone
  std::span<const std::int64_t> widths;  // empty: shrink alone
  std::int64_t max_rank;
  std::int64_t math_bytes;  // of the numbers that are multiplied
};

struct Gpu {
  std::int32_t multiprocessors;
  std::int32_t narrow_blocks, wide_blocks;  // that a multiprocessor holds of each kernel
};

struct Config {
  bool wide;
  std::int32_t units, chunks_per_unit;  // of a tile's sums along K
  std::int32_t planes_per_part;
  std::int32_t wanted_items;
  std::int64_t window;     // tokens in a launch
  std::int64_t v_columns;  // of a projection in a row of v
  std::int64_t blocks;
  std::int64_t workspace;  // bytes: counters, plan, v
  std::int64_t plan_begin, v_begin;
};
Config choose(const Problem& problem, const Gpu& gpu);

}  // namespace toppings::cuda
