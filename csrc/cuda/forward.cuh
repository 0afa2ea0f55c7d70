// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/expand.cuh"
#include "cuda/shrink.cuh"

// Both phases in one launch. Blocks draw tickets: first all shrink items, then all expand items,
// which wait for the shrink items of their own tile. Those were drawn before by blocks that run, so
// whoever waits is waited for by nobody it waits for: no deadlock, however few blocks are resident
// and whatever else the GPU runs.
namespace toppings::cuda {

template <class Math, class Tile>
TOPPINGS_DEVICE std::int32_t column_tiles(const LoraParams& p, int projection) {
  constexpr int kColumns = kTileColumns<Math, Tile>;
  return (p.columns[projection + 1] - p.columns[projection] + kColumns - 1) / kColumns;
}

// Shrink items are tile x unit of K x split of the ranks, expand items tile x range of columns.
template <class Math, class Tile>
TOPPINGS_DEVICE void find_work(const LoraParams& p, const std::int32_t* plan,
                               const std::int32_t* begins, Work& work) {
  find_tiles<Tile::kTokens>(p, plan, begins, work);
  work.rank_splits = 1;
  work.shrinks_per_tile = work.expands_per_tile = 0;
  if (p.x != nullptr && work.tiles > 0) {
    const auto most = static_cast<std::int32_t>(
        (p.num_projections * p.v.projection_stride + Tile::kRanks - 1) / Tile::kRanks);
    const std::int32_t wanted = p.wanted_items / (work.tiles * p.units);
    work.rank_splits = wanted < 1 ? 1 : wanted < most ? wanted : most;
    work.shrinks_per_tile = p.units * work.rank_splits;
  }
  if (p.y == nullptr) {
    work.expands_per_tile = 1;
  } else {
    for (int s = 0; s < p.num_projections; ++s) {
      work.expands_per_tile += column_tiles<Math, Tile>(p, s);
    }
  }
}

TOPPINGS_DEVICE std::uint32_t shrink_items(const Work& work) {
  return static_cast<std::uint32_t>(work.tiles) * static_cast<std::uint32_t>(work.shrinks_per_tile);
}
TOPPINGS_DEVICE std::uint32_t all_items(const Work& work) {
  return shrink_items(work) +
         static_cast<std::uint32_t>(work.tiles) * static_cast<std::uint32_t>(work.expands_per_tile);
}

// Returns when the shrink items of the tile have ended. All threads of the block. How many those
// are depends on the plan and the host alone: ranks are data, and waiting for as many items as they
// call for would hang if one changed meanwhile.
TOPPINGS_DEVICE void wait_for_shrink(const LoraParams& p, const Work& work, std::int32_t tile) {
  if (thread_index().x == 0 && work.shrinks_per_tile > 0) {
    const auto expected = static_cast<std::uint32_t>(work.shrinks_per_tile);
    while (load_acquire(p.counters + 2 + tile) < expected) yield_while_waiting();
  }
  sync_block();
}

template <class Math, class Tile>
TOPPINGS_DEVICE void do_item(const LoraParams& p, std::uint32_t number, Scratch<Tile>& scratch,
                             std::byte* stages) {
  const Work& work = scratch.work;
  const bool shrinks = number < shrink_items(work);
  if (!shrinks) number -= shrink_items(work);
  const auto per_tile =
      static_cast<std::uint32_t>(shrinks ? work.shrinks_per_tile : work.expands_per_tile);
  const auto tile_number = static_cast<std::int32_t>(number / per_tile);
  auto rest = static_cast<std::int32_t>(number % per_tile);
  const TokenTile tile = tile_of<Tile::kTokens>(work, tile_number);
  if (tile.count == 0) return;
  const Thread thread = this_thread();
  const std::int32_t slot = load_tokens(thread, p, tile, scratch);
  if (shrinks) {
    // A split beyond the slot's ranks has nothing to do, and counts too.
    shrink<Math>(thread, p, tile, slot, rest % p.units, rest / p.units, work.rank_splits, scratch,
                 stages);
    if (thread.index == 0) atomic_add_acq_rel(p.counters + 2 + tile_number, 1);
    return;
  }
  sync_block();
  const auto wait = [&] { wait_for_shrink(p, work, tile_number); };
  if (p.y == nullptr) {
    wait();
    write_v(thread, p, tile, slot, scratch);
    return;
  }
  int projection = 0;
  for (; rest >= column_tiles<Math, Tile>(p, projection); ++projection) {
    rest -= column_tiles<Math, Tile>(p, projection);
  }
  expand<Math>(thread, p, tile, slot, projection, rest * kTileColumns<Math, Tile>, scratch, stages,
               wait);
}

template <class Math, class Tile>
TOPPINGS_KERNEL TOPPINGS_LAUNCH_BOUNDS(kThreads<Tile>, Tile::kBlocks)
    lora_kernel(const TOPPINGS_GRID_CONSTANT LoraParams p) {
  auto& scratch = *reinterpret_cast<Scratch<Tile>*>(dynamic_shared());
  std::byte* stages = dynamic_shared() + sizeof(Scratch<Tile>);
  const bool leads = thread_index().x == 0;
  wait_for_previous_kernel();

  const std::int32_t* plan = p.plan;
  const std::int32_t* begins;
  if (plan == nullptr) {
    make_small_plan(p, reinterpret_cast<std::int32_t*>(stages), scratch.plan);
    plan = scratch.plan;
    begins = plan + 1 + p.tokens;
  } else {
    begins = plan + 1 + p.tokens;
    // Tiles are found by binary search: worth a copy of the segments' begins where it fits.
    const auto segments = load_global_coherent<std::int32_t>(plan);
    if (segments <= 2 * kSmallBatch) {
      for (auto i = static_cast<std::int32_t>(thread_index().x); i <= segments;
           i += kThreads<Tile>) {
        scratch.plan[i] = load_global_coherent<std::int32_t>(begins + i);
      }
      begins = scratch.plan;
      sync_block();
    }
  }
  if (leads) find_work<Math, Tile>(p, plan, begins, scratch.work);

  // The next ticket is drawn while this one's item is worked on.
  std::uint32_t next = leads ? atomic_add_relaxed(p.counters, 1) : 0;
  for (;;) {
    sync_block();
    if (leads) scratch.ticket = next;
    sync_block();
    const std::uint32_t ticket = scratch.ticket;
    if (ticket >= all_items(scratch.work)) break;
    if (leads) next = atomic_add_relaxed(p.counters, 1);
    do_item<Math>(p, ticket, scratch, stages);
  }

  // The last block to end leaves the counters as it found them.
  let_next_kernel_start();
  sync_block();
  if (leads) scratch.ticket = atomic_add_acq_rel(p.counters + 1, 1);
  sync_block();
  if (scratch.ticket != grid_size().x - 1) return;
  for (auto i = static_cast<std::int32_t>(thread_index().x); i < scratch.work.tiles + 2;
       i += kThreads<Tile>) {
    store_global(p.counters + i, std::uint32_t{0});
  }
}

}  // namespace toppings::cuda
