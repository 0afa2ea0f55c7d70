// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "planted.cuh"
#include "sim.h"

// The planted kernels with their data and their expected results.
namespace toppings::sim {

using cuda::planted::Bug;

struct Outcome {
  Report report;
  bool correct;  // the result
};

// `rows` rows exactly, on the heap, so that AddressSanitizer knows their end.
template <Bug bug>
Outcome run_pipeline(Options options, int rows = 45) {
  namespace p = cuda::planted;
  constexpr int kBlocks = 3, kTiles = 4;
  const std::size_t bytes = static_cast<std::size_t>(rows) * p::kRowBytes;
  const auto x = std::make_unique<std::uint32_t[]>(bytes / 4);
  for (std::size_t i = 0; i < bytes / 4; ++i) x[i] = static_cast<std::uint32_t>(i * 2654435761u);
  std::vector<std::uint32_t> expected(kBlocks * p::kThreads), sums(expected.size());
  for (int row = 0; row < rows && row < kTiles * kBlocks * p::kTileRows; ++row) {
    for (int i = 0; i < p::kThreads * 4; ++i) {
      const int block = row / p::kTileRows % kBlocks;
      expected[static_cast<std::size_t>(block * p::kThreads + p::kThreads - 1 - i / 4)] +=
          x[static_cast<std::size_t>(row * p::kThreads * 4 + i)];
    }
  }
  options.memory = {{x.get(), bytes, "x"}, {sums.data(), sums.size() * 4, "sums"}};
  const p::Pipeline arguments{reinterpret_cast<const std::byte*>(x.get()), rows, kTiles,
                              sums.data()};
  Report report =
      launch(p::pipeline<bug>,
             {.grid = {kBlocks}, .block = {p::kThreads}, .shared_bytes = p::kPipelineShared},
             options, arguments);
  return {std::move(report), sums == expected};
}

template <Bug bug>
Outcome run_warp_transpose(const Options& options) {
  std::vector<std::uint32_t> x(4 * 1024), y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint32_t>(i * 7919);
  Report report =
      launch(cuda::planted::warp_transpose<bug>, {.block = {128}, .shared_bytes = 4 * 32 * 33 * 4},
             options, x.data(), y.data());
  return {std::move(report), x == y};
}

template <Bug bug>
Outcome run_pass_left(const Options& options) {
  std::vector<std::uint32_t> x(64), y(64);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<std::uint32_t>(i * 7919);
  Report report = launch(cuda::planted::pass_left<bug>, {.block = {64}, .shared_bytes = 256},
                         options, x.data(), y.data());
  bool correct = true;
  for (std::size_t i = 0; i < y.size(); ++i) {
    correct = correct && y[i] == x[i / 32 * 32 + (i + 1) % 32];
  }
  return {std::move(report), correct};
}

template <Bug bug>
Outcome run_last_block(const Options& options) {
  constexpr unsigned kBlocks = 20;
  std::vector<std::uint32_t> x(kBlocks * 32), partial(kBlocks);
  std::uint32_t expected = 0, sum = 0, counter = 0;
  for (std::uint32_t& value : x) expected += value = static_cast<std::uint32_t>(&value - x.data());
  Report report = launch(cuda::planted::last_block<bug>, {.grid = {kBlocks}, .block = {32}},
                         options, x.data(), partial.data(), &counter, &sum);
  return {std::move(report), sum == expected};
}

template <Bug bug>
Outcome run_chain(const Options& options, unsigned blocks = 4) {
  std::vector<std::uint32_t> flags(blocks), y(blocks);
  Report report = launch(cuda::planted::chain<bug>, {.grid = {blocks}, .block = {64}}, options,
                         flags.data(), y.data());
  bool correct = true;
  for (unsigned i = 0; i < blocks; ++i) correct = correct && y[i] == blocks - i;
  return {std::move(report), correct};
}

}  // namespace toppings::sim
