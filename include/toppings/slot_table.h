// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/arena.h>
#include <toppings/device.h>
#include <toppings/export.h>
#include <toppings/image.h>
#include <toppings/model_shape.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace toppings {

// Which adapter lies where in an arena, and the tables the operators read. The only table of its
// arena. A slot is pinned while requests use it; an unpinned slot stays resident until its range or
// its index is needed.
//
// What goes then is the cheapest window: adjacent ranges, free or idle, that are large enough
// together (when there is room and only an index is missing, the cheapest single idle adapter). A
// window costs the sum over its adapters of
//     image bytes / age,   age = acquires and releases (of any slot) since its own last one, >= 1:
// the bytes to load again, weighted with 1 / age as the chance that they are wanted next. So among
// equals the least recently used goes first; of equal windows, the one at the lowest address.
//
// An evicted or unpublished slot has rank 0 in every row, so a freed range can't be read through
// it. The image is held while its slot is pinned: an adapter that is only resident leaves its host
// memory to others. Thread-safe; the rows of a slot change only in
// publish() and when an idle slot is evicted, never while it is pinned and published.
//
// In an arena that is_in_place() an adapter takes a slot and no range: it is published as it is
// acquired, and goes with its last pin, since nothing is lost.
class TOPPINGS_EXPORT SlotTable {
 public:
  struct Acquired {
    int slot;
    bool resident;  // every layer is published; false: the caller must load it before use
  };
  struct Stats {
    int slots, resident, pinned;           // resident: slots with an adapter, loaded or not
    std::int64_t arena_bytes, used_bytes;  // per layer; 0 in place
    std::int64_t evictions;                // none in place, where nothing is lost
  };

  // Throws invalid_argument: num_slots < 1, or layer counts of shape and arena differ.
  SlotTable(std::shared_ptr<const ModelShape> shape, std::shared_ptr<Arena> arena, int num_slots);
  ~SlotTable();
  SlotTable(const SlotTable&) = delete;
  SlotTable& operator=(const SlotTable&) = delete;

  const std::shared_ptr<Arena>& arena() const noexcept;

  // A pinned slot for the image: the one it has, or a new one with an exact-size range. Evicts idle
  // adapters when it must. Throws mismatch (other base model or dtype), invalid_argument (larger
  // than the whole arena, or of another layout than a pinned one of this digest), slots_busy
  // (nothing idle would make room now; nothing was evicted then).
  Acquired acquire(std::shared_ptr<const Image> image);

  // Would acquire succeed now, rather than throw slots_busy? Throws as acquire does for an image
  // that will never fit. Not a use.
  bool can_acquire(const Image& image) const;

  // One pin less. Whatever was enqueued on the device and reads the slot must have run by the last
  // one. Throws invalid_argument for a slot that isn't pinned.
  void release(int slot);

  // The slot an adapter has, loaded or not, or -1. Not a use.
  int find(const std::string& digest) const;

  // Makes layer `layer` of a pinned slot visible in the tables, after its bytes have arrived.
  // Publishing again changes nothing. Throws invalid_argument for a slot that isn't pinned.
  void publish(int slot, int layer);
  // Takes that back, where the bytes turn out to be lost.
  void unpublish(int slot, int layer);
  bool is_published(int slot, int layer) const;  // false for a slot without an adapter

  // Where layer `layer` of a pinned slot goes: the start of its range in that layer of the arena.
  // Throws invalid_argument for a slot that isn't pinned: its range could be given away.
  std::byte* layer_data(int slot, int layer);

  // Throws invalid_argument for a slot that isn't pinned.
  std::shared_ptr<const Image> image(int slot) const;

  // The operators' tables, alive as long as this object:
  // slots [num_rows, num_slots, 3]: element offset of A and of B in the layer's arena, rank;
  // scales [num_rows, num_slots]. In host memory, up to date at any time.
  int num_slots() const noexcept;
  int num_rows() const noexcept;
  std::span<const std::int64_t> slots() const noexcept;
  std::span<const float> scales() const noexcept;

  // The same tables in the arena's device memory, as of the last upload that ran; on the host they
  // are the ones above.
  const std::int64_t* device_slots() const noexcept;
  const float* device_scales() const noexcept;

  // What is enqueued in the stream from now on sees the tables as they are now, of all layers or of
  // one. Does nothing where nothing changed, and on the host. All uploads of a table go to one
  // stream, the one that computes.
  void upload(Stream& stream);
  void upload(Stream& stream, int layer);

  Stats stats() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace toppings
