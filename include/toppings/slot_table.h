// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include <toppings/arena.h>
#include <toppings/export.h>
#include <toppings/image.h>

namespace toppings {

// Which adapter lies where in an arena, and the tables the operators read. A slot is pinned while requests use it; an
// unpinned slot stays resident until its range or its index is needed: then the window of adjacent idle ranges that is
// cheapest to reload goes. An evicted or unpublished slot has rank 0 in every row, so a freed range can't be read
// through it. Thread-safe.
class TOPPINGS_EXPORT SlotTable {
 public:
  struct Acquired {
    int slot;
    bool resident;  // false: the caller must load it (Loader) before use
  };
  struct Stats {
    int slots, resident, pinned;
    std::int64_t arena_bytes, used_bytes;  // per layer
    std::int64_t evictions;
  };

  // Throws invalid_argument: num_slots < 1, or layer counts of shape and arena differ.
  SlotTable(std::shared_ptr<const ModelShape> shape, std::shared_ptr<Arena> arena, int num_slots);
  ~SlotTable();
  SlotTable(const SlotTable&) = delete;
  SlotTable& operator=(const SlotTable&) = delete;

  // A pinned slot for the image: the one it has, or a new one with an exact-size range. Evicts idle adapters when it must.
  // Throws mismatch (other base model or dtype), invalid_argument (larger than the whole arena), slots_busy (nothing
  // idle would make room now; nothing was evicted then).
  Acquired acquire(std::shared_ptr<const Image> image);

  // Would acquire succeed now?
  bool can_acquire(const Image& image) const;

  // One pin less. Throws invalid_argument for a slot that isn't pinned.
  void release(int slot);

  // The slot an adapter has, or -1.
  int find(const std::string& digest) const;

  // Makes layer `layer` of a slot visible in the tables, after its bytes have arrived.
  void publish(int slot, int layer);

  // Where layer `layer` of a slot goes: the start of its range in that layer of the arena.
  std::byte* layer_data(int slot, int layer) const;
  std::shared_ptr<const Image> image(int slot) const;

  // The operators' tables, host memory, alive as long as this object:
  // slots [num_rows, num_slots, 3]: element offset of A and of B in the layer's arena, rank; scales [num_rows, num_slots].
  int num_slots() const noexcept;
  std::span<const std::int64_t> slots() const noexcept;
  std::span<const float> scales() const noexcept;

  Stats stats() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace toppings
