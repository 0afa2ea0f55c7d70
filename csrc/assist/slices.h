// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/assist/task.h>

#include <atomic>
#include <cstdint>
#include <optional>

namespace toppings::assist {

// How the threads of one process share the task of one slot: memory of their own, so that a process
// that dies leaves nothing half done in the channel.
//
// One thread opens an epoch, by which the others may not yet take; it copies the task, whose slot
// is read by nobody else. Then whoever comes takes slices, and who ends the last one answers. The
// copy stays as it is until then: the next epoch isn't asked for before this one is acknowledged.
class Slices {
 public:
  // No epoch but those after this one is open.
  void reset(std::uint32_t epoch) { state_.store(pack(epoch, 0)); }

  // Is this thread the one that opens `epoch`?
  bool try_open(std::uint32_t epoch) {
    std::uint64_t now = state_.load(std::memory_order_relaxed);
    // Earlier: this thread was held up after it read the request, and others have gone on.
    if (static_cast<std::int32_t>(epoch - epoch_of(now)) <= 0) return false;
    // An engine that keeps to the protocol doesn't ask before the last one is acknowledged.
    if (unfinished_.load(std::memory_order_acquire) != 0) return false;
    return state_.compare_exchange_strong(now, pack(epoch, kOpening), std::memory_order_acquire,
                                          std::memory_order_relaxed);
  }

  // By the thread that opened it; count 0: nobody will do it.
  void open(std::uint32_t epoch, const Task& task, std::uint32_t count) {
    task_ = task;
    count_ = count;
    has_failed_.store(false, std::memory_order_relaxed);
    unfinished_.store(count, std::memory_order_relaxed);
    state_.store(pack(epoch, count), std::memory_order_release);
  }

  // The index of a slice nobody has taken.
  std::optional<std::uint32_t> take() {
    std::uint64_t now = state_.load(std::memory_order_acquire);
    while (left_of(now) != 0 && left_of(now) != kOpening) {
      if (state_.compare_exchange_weak(now, now - 1, std::memory_order_acquire)) {
        return left_of(now) - 1;
      }
    }
    return std::nullopt;
  }

  // For whoever has taken a slice and not yet finished it.
  const Task& task() const { return task_; }
  std::uint32_t count() const { return count_; }
  std::uint32_t epoch() const { return epoch_of(state_.load(std::memory_order_relaxed)); }

  // For whoever couldn't do a slice; it is finished all the same.
  void fail() { has_failed_.store(true, std::memory_order_relaxed); }

  // For whoever finished the last slice.
  bool has_failed() const { return has_failed_.load(std::memory_order_relaxed); }

  // Was that the last one?
  bool finish() { return unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1; }

 private:
  static constexpr std::uint32_t kOpening = UINT32_MAX;
  static std::uint64_t pack(std::uint32_t epoch, std::uint32_t left) {
    return std::uint64_t{epoch} << 32 | left;
  }
  static std::uint32_t epoch_of(std::uint64_t state) {
    return static_cast<std::uint32_t>(state >> 32);
  }
  static std::uint32_t left_of(std::uint64_t state) { return static_cast<std::uint32_t>(state); }

  alignas(64) std::atomic<std::uint64_t> state_{0};  // epoch, slices left
  alignas(64) std::atomic<std::uint32_t> unfinished_{0};
  std::atomic<bool> has_failed_{false};
  std::uint32_t count_ = 0;
  Task task_{};
};

}  // namespace toppings::assist
