// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/assist/geometry.h>
#include <toppings/assist/task.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "assist/shared_memory.h"

// The bytes of a channel: docs/assist.md. Plain data; whatever two sides touch is a word of its own
// cache line, reached through std::atomic_ref.
namespace toppings::assist {

inline constexpr std::size_t kLine = 64;
inline constexpr std::uint64_t kMagic = 0x31747369737361;  // "assist1"
inline constexpr std::uint32_t kVersion = 1;

// Bytes of the shared memory whose lock says that a side lives.
inline constexpr int kEngineLock = 0;
inline constexpr int kWorkersLock = 1;

// Header::workers: the lowest bit tells whether there are any, the rest counts those that came. So
// a successor isn't taken for the one whose death was just seen.
inline constexpr std::uint32_t kServing = 1;

struct Header {
  // Written by the engine before anybody else knows the memory.
  alignas(kLine) std::uint64_t magic;
  std::uint32_t version;
  std::int32_t num_slots;
  std::int64_t x_bytes, deltas_bytes;

  alignas(kLine) std::uint32_t workers;   // by workers; for dead ones the engine clears kServing
  alignas(kLine) std::int64_t heartbeat;  // by workers: steady clock, ns
  // Bit 0: a worker sleeps or is about to; the rest counts wake-ups. By both; slept on.
  alignas(kLine) std::uint32_t sleep;
};

struct Slot {
  alignas(kLine) std::uint32_t request;  // by the engine, or its stream: x is there
  alignas(kLine) std::uint32_t reply;    // by whoever answers first; +1: the engine did
  // by workers: they touch nothing of it any more, and whether that was without an answer
  alignas(kLine) std::uint32_t acknowledged;
  std::uint32_t refused;
  alignas(kLine) std::uint32_t announced;  // by the engine: the task below is or will be asked
  std::uint32_t awaited;                   // by the engine: somebody may sleep on the reply
  alignas(kLine) Task task;                // by the engine
};

// a - b as epochs, which wrap.
inline std::int32_t since(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::int32_t>(a - b);
}

// A word that both sides touch.
inline std::atomic_ref<std::uint32_t> shared(std::uint32_t& word) { return std::atomic_ref(word); }

// Where things lie. Geometry is believed: it was checked by make() or on opening.
class Layout {
 public:
  explicit Layout(const Geometry& geometry);

  const Geometry& geometry() const noexcept { return geometry_; }
  std::size_t bytes() const noexcept {
    return sizeof(Header) + slot_bytes_ * static_cast<std::size_t>(geometry_.num_slots);
  }
  Slot& slot(std::byte* base, int index) const noexcept {
    return *reinterpret_cast<Slot*>(base + sizeof(Header) +
                                    slot_bytes_ * static_cast<std::size_t>(index));
  }
  std::byte* x(Slot& slot) const noexcept { return reinterpret_cast<std::byte*>(&slot + 1); }
  // The workers' deltas, and those of an engine that answers itself.
  std::byte* deltas(Slot& slot, bool by_engine) const noexcept {
    return x(slot) + x_bytes_ + (by_engine ? deltas_bytes_ : 0);
  }

 private:
  Geometry geometry_;
  std::size_t x_bytes_, deltas_bytes_, slot_bytes_;  // multiples of a line
};

// A channel's memory as either side sees it.
struct ChannelMemory {
  // Throws invalid_argument for an impossible geometry.
  ChannelMemory(const Geometry& geometry, const std::string& name, std::uint32_t first_epoch);
  // Throws not_found, or format for memory that isn't a channel of this version.
  explicit ChannelMemory(const std::string& name);

  Header& header() const noexcept { return *reinterpret_cast<Header*>(memory.data()); }
  Slot& slot(int index) const noexcept { return layout.slot(memory.data(), index); }
  int num_slots() const noexcept { return layout.geometry().num_slots; }

  SharedMemory memory;
  Layout layout;
  std::atomic<bool> has_own_workers{false};  // in the engine's process
};

// Wakes workers that sleep; without one, only a load.
void wake_workers(Header& header);

}  // namespace toppings::assist
