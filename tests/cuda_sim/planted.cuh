// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/ptx.cuh"

// Kernels with a bug each, and what they are without it (Bug::none). Templates, because
// ThreadSanitizer reports the same two places only once.
namespace toppings::cuda::planted {

enum class Bug {
  none,
  // pipeline()
  missing_barrier,    // tile read before the other warps' copies are known to have arrived
  early_read,         // tile read before its copy was waited for
  overwritten_stage,  // next copy into a stage that others still read
  unfinished_copies,  // kernel ends with copies on their way
  out_of_bounds_row,  // rows beyond the last one are read
  skipped_barrier,    // a warp leaves out one barrier
  // warp_transpose()
  missing_warp_barrier,
  missing_warp_barrier_back,  // between reading and the next writing
  // pass_left()
  vote_as_barrier,  // a ballot between writing and reading: it doesn't order memory
  // last_block()
  no_release,     // the counter is relaxed: partial sums may not be visible
  constant_load,  // partial sums read by a load for read-only data
  // chain()
  lost_flag,      // a block doesn't set the flag that the next one waits for
  naked_spinning  // doesn't yield while it waits
};

constexpr int kThreads = 128;
constexpr int kRowBytes = 16 * kThreads;
constexpr int kStages = 3;

// Every block sums its tiles of four rows (2048 bytes each), of which the last may have fewer:
// sums[block][thread] = sum over tiles and rows of the thread's mirror image's 4 words.
// Shared: kStages * 4 rows.
struct Pipeline {
  const std::byte* x;  // [rows][kRowBytes]
  int rows;
  int tiles;            // of the block: tile i holds the rows (i * blocks + block) * 4 ...
  std::uint32_t* sums;  // [blocks][kThreads]
};

constexpr int kTileRows = 4;
constexpr std::size_t kPipelineShared = kStages * kTileRows * kRowBytes;

template <Bug bug>
TOPPINGS_DEVICE void copy_tile(const Pipeline& p, std::byte* stage, int tile) {
  if (tile < p.tiles) {
    const int first =
        (tile * static_cast<int>(grid_size().x) + static_cast<int>(block_index().x)) * kTileRows;
    for (int row = 0; row < kTileRows; ++row) {
      const bool valid = first + row < p.rows || bug == Bug::out_of_bounds_row;
      const std::size_t column = 16 * thread_index().x;
      copy_async<16>(stage + row * kRowBytes + column,
                     p.x + static_cast<std::size_t>(first + row) * kRowBytes + column,
                     valid ? 16 : 0);
    }
  }
  commit_copies();
}

template <Bug bug>
TOPPINGS_KERNEL pipeline(Pipeline p) {
  const unsigned thread = thread_index().x;
  const auto stage = [&](int tile) {
    return dynamic_shared() + tile % kStages * kTileRows * kRowBytes;
  };
  for (int tile = 0; tile < kStages - 1; ++tile) copy_tile<bug>(p, stage(tile), tile);
  std::uint32_t sum = 0;
  for (int tile = 0; tile < p.tiles; ++tile) {
    if (bug != Bug::early_read) wait_copies<kStages - 2>();
    const int next = tile + kStages - 1;  // into the stage that the previous tile was read from
    if (bug == Bug::overwritten_stage) copy_tile<bug>(p, stage(next), next);
    const bool skipped = bug == Bug::skipped_barrier && warp() == 1 && tile == 1;
    if (bug != Bug::missing_barrier && !skipped) sync_block();
    if (bug != Bug::overwritten_stage) copy_tile<bug>(p, stage(next), next);
    for (int row = 0; row < kTileRows; ++row) {
      const auto words =
          load_shared<Vec16>(stage(tile) + row * kRowBytes + 16 * (kThreads - 1 - thread));
      for (const std::uint32_t word : words.w) sum += word;
    }
  }
  if (bug == Bug::unfinished_copies) {
    copy_tile<bug>(p, stage(0), 0);
  } else {
    wait_copies<0>();
  }
  store_global(p.sums + block_index().x * block_size().x + thread, sum);
}

// Each warp turns its 32 x 32 words around, twice: y = x. Shared: 32 * 33 words per warp.
template <Bug bug>
TOPPINGS_KERNEL warp_transpose(const std::uint32_t* x, std::uint32_t* y) {
  constexpr unsigned kStride = 33;
  auto* tile = reinterpret_cast<std::uint32_t*>(dynamic_shared()) + warp() * 32 * kStride;
  x += warp() * 1024;
  y += warp() * 1024;
  std::uint32_t column[32];
  for (unsigned i = 0; i < 32; ++i) column[i] = load_global<std::uint32_t>(x + i * 32 + lane());
  for (int time = 0; time < 2; ++time) {
    for (unsigned i = 0; i < 32; ++i) store_shared(tile + i * kStride + lane(), column[i]);
    if (bug != Bug::missing_warp_barrier) sync_warp();
    for (unsigned i = 0; i < 32; ++i) {
      column[i] = load_shared<std::uint32_t>(tile + lane() * kStride + i);
    }
    if (bug != Bug::missing_warp_barrier_back) sync_warp();
  }
  for (unsigned i = 0; i < 32; ++i) store_global(y + i * 32 + lane(), column[i]);
}

// y[i] = x[(i + 1) % 32] in every warp. Shared: a word per thread.
template <Bug bug>
TOPPINGS_KERNEL pass_left(const std::uint32_t* x, std::uint32_t* y) {
  std::byte* words = dynamic_shared() + warp() * 128;
  const unsigned thread = thread_index().x;
  store_shared(words + 4 * lane(), load_global<std::uint32_t>(x + thread));
  if (bug == Bug::vote_as_barrier) {
    if (!any(true)) return;
  } else {
    sync_warp();
  }
  store_global(y + thread, load_shared<std::uint32_t>(words + (lane() + 1) % 32 * 4));
}

// sum = the sum of x [blocks][32]: the last block to finish adds up the partial sums, in order.
template <Bug bug>
TOPPINGS_KERNEL last_block(const std::uint32_t* x, std::uint32_t* partial, std::uint32_t* counter,
                           std::uint32_t* sum) {
  const std::uint32_t blocks = grid_size().x;
  std::uint32_t value = load_global<std::uint32_t>(x + block_index().x * 32 + lane());
  for (unsigned mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  if (lane() != 0) return;
  store_global(partial + block_index().x, value);
  const std::uint32_t before =
      bug == Bug::no_release ? atomic_add_relaxed(counter, 1u) : atomic_add_acq_rel(counter, 1u);
  if (before != blocks - 1) return;
  std::uint32_t all = 0;
  for (std::uint32_t i = 0; i < blocks; ++i) {
    all += bug == Bug::constant_load ? load_global<std::uint32_t>(partial + i)
                                     : load_global_coherent<std::uint32_t>(partial + i);
  }
  store_global(sum, all);
}

// Block i waits for block i + 1, the last one for nobody: y[i] = blocks - i.
template <Bug bug>
TOPPINGS_KERNEL chain(std::uint32_t* flags, std::uint32_t* y) {
  const unsigned block = block_index().x;
  std::uint32_t value = 1;
  if (block + 1 < grid_size().x) {
    while (load_acquire(flags + block + 1) == 0) {
      if (bug != Bug::naked_spinning) yield_while_waiting();
    }
    value = load_global_coherent<std::uint32_t>(y + block + 1) + 1;
  }
  sync_block();
  if (thread_index().x != 0) return;
  store_global(y + block, value);
  const bool lost = bug == Bug::lost_flag && block == 1;
  if (!lost) store_release(flags + block, 1u);
}

}  // namespace toppings::cuda::planted
