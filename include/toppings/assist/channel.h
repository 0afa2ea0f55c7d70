// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/assist/geometry.h>
#include <toppings/assist/task.h>
#include <toppings/export.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

namespace toppings::assist {

struct ChannelMemory;

// A task in a slot. Epochs are even, go up by 2 from one task of a slot to the next, and wrap.
struct Submission {
  int slot;
  std::uint32_t epoch;
};

// A word for Stream::write_value or Stream::wait_value.
struct Flag {
  std::uint32_t* address;
  std::uint32_t value;
};

enum class Outcome {
  done,       // the deltas are there
  timed_out,  // not yet; the workers live
  gone,       // no worker will do it
};

// An engine's end of shared memory through which CPU workers take tasks: in this process, or in
// another one under a name. Any number of tasks may be under way, each in a slot of its own.
//
// submit, await, read deltas, release. A stream does the same without the host: reserve, copy to
// x(), write request(), wait for reply(), read deltas by_engine or not as the reply's lowest bit
// tells; release once all that has run. Whatever await returned, redo() makes the deltas there, so
// that no stream waits for ever.
//
// Thread-safe; a submission belongs to one thread at a time. docs/assist.md has the protocol.
class TOPPINGS_EXPORT Channel {
 public:
  // name: "" for this process alone, else one of POSIX shared memory ("/toppings-4711") that
  // doesn't exist. Throws invalid_argument or out_of_memory. first_epoch: for tests; even.
  explicit Channel(const Geometry& geometry, const std::string& name = {},
                   std::uint32_t first_epoch = 0);
  ~Channel();
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  const Geometry& geometry() const noexcept;

  // All of it, for Device::page_lock.
  std::span<std::byte> memory() const noexcept;

  // Are there workers, whose last sign of life is no older than that? They give one every
  // kHeartbeat, or when a slice of a task ends.
  static constexpr std::chrono::milliseconds kHeartbeat{50};
  bool has_workers(std::chrono::nanoseconds longest_silence = std::chrono::hours(24 * 365)) const;

  // Copies x [tokens, in], rows x_stride elements apart, and asks the workers. Nothing when the
  // channel is full or nobody serves it; never waits. `keep`, the image, is held until no worker
  // can read it any more. Throws invalid_argument for a task that can't be or doesn't fit a slot.
  std::optional<Submission> submit(const Task& task, const void* x, std::int64_t x_stride,
                                   std::shared_ptr<const void> keep = nullptr);

  // The same without x: whoever writes it then writes request(). Workers stay awake meanwhile.
  std::optional<Submission> reserve(const Task& task, std::shared_ptr<const void> keep = nullptr);

  std::byte* x(Submission submission) const;  // [geometry.x_bytes], 64-byte aligned
  Flag request(Submission submission) const;  // to write
  Flag reply(Submission submission) const;    // to wait for
  std::byte* deltas(Submission submission, bool by_engine) const;  // [geometry.deltas_bytes]

  // Spins for a moment before it sleeps. It may be called again.
  Outcome await(Submission submission, std::chrono::nanoseconds timeout) const;

  // Computes the task in the calling thread and answers it, unless a worker was faster: it is done
  // either way. The request has been written.
  void redo(Submission submission, std::span<const Region> regions) const;

  // Of a task that is done: where its deltas are.
  const std::byte* deltas(Submission submission) const;

  // The slot is for others now; if the workers may still write to it, only once they can't.
  void release(Submission submission);

  struct Stats {
    int free, taken;
    int quarantined;  // released, but a worker may still be at it
  };
  Stats stats();

 private:
  friend class Workers;
  class Impl;
  std::shared_ptr<ChannelMemory> memory_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace toppings::assist
