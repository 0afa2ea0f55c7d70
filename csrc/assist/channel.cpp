// SPDX-License-Identifier: Apache-2.0
#include <toppings/assist/channel.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <utility>
#include <vector>

#include "assist/compute.h"
#include "assist/layout.h"
#include "check.h"
#include "host/futex.h"
#include "host/spin.h"

namespace toppings::assist {
namespace {

// How often a sleeping await looks whether the workers live.
constexpr std::chrono::milliseconds kLookAfter{1};

// Do workers serve the channel? Those of this process say so when they leave; for the dead ones of
// another process the engine does.
bool is_served(const ChannelMemory& memory) {
  const auto workers = shared(memory.header().workers);
  std::uint32_t state = workers.load(std::memory_order_acquire);
  if ((state & kServing) == 0) return false;
  if (!memory.memory.is_shared() || memory.has_own_workers) return true;
  if (memory.memory.is_locked_elsewhere(kWorkersLock)) return true;
  workers.compare_exchange_strong(state, state - kServing);
  return false;
}

bool is_acknowledged(Slot& slot, std::uint32_t epoch) {
  return shared(slot.acknowledged).load(std::memory_order_acquire) == epoch;
}

}  // namespace

// What the engine alone knows of its slots.
class Channel::Impl {
 public:
  Impl(ChannelMemory& memory, std::uint32_t first_epoch)
      : memory_(memory), slots_(static_cast<std::size_t>(memory.num_slots())) {
    for (Held& held : slots_) held.epoch = first_epoch;
  }

  // The next slot in the ring that is free. Of quarantined ones, only where none was left.
  std::optional<Submission> take(std::shared_ptr<const void> keep) {
    Keeps settled;  // outlives the lock
    const std::lock_guard lock(mutex_);
    const int slot = find(settled);
    if (slot < 0) return std::nullopt;
    Held& held = slots_[static_cast<std::size_t>(slot)];
    held = {.state = State::taken, .epoch = held.epoch + 2, .keep = std::move(keep)};
    next_ = (slot + 1) % memory_.num_slots();
    return Submission{slot, held.epoch};
  }

  void release(Submission submission, bool is_quiet) {
    Keeps settled;
    const std::lock_guard lock(mutex_);
    Held& held = slots_[static_cast<std::size_t>(submission.slot)];
    held.state = State::quarantined;
    if (is_quiet) let_go(held, settled);
    settle(settled);
  }

  void check(Submission submission) const {
    check_index("slot", submission.slot, memory_.num_slots());
    const std::lock_guard lock(mutex_);
    const Held& held = slots_[static_cast<std::size_t>(submission.slot)];
    if (held.state == State::taken && held.epoch == submission.epoch) return;
    fail(Status::invalid_argument, "submission", "one that wasn't released", "another");
  }

  Stats stats() {
    Keeps settled;
    const std::lock_guard lock(mutex_);
    settle(settled);
    const auto count = [&](State state) {
      return static_cast<int>(std::ranges::count(slots_, state, &Held::state));
    };
    return {.free = count(State::free),
            .taken = count(State::taken),
            .quarantined = count(State::quarantined)};
  }

 private:
  enum class State { free, taken, quarantined };
  struct Held {
    State state = State::free;
    std::uint32_t epoch = 0;
    std::shared_ptr<const void> keep = nullptr;
  };
  using Keeps = std::vector<std::shared_ptr<const void>>;

  int find(Keeps& settled) {
    for (int pass = 0; pass < 2; ++pass) {
      for (int i = 0; i < memory_.num_slots(); ++i) {
        const int slot = (next_ + i) % memory_.num_slots();
        if (slots_[static_cast<std::size_t>(slot)].state == State::free) return slot;
      }
      if (pass == 0 && !settle(settled)) break;
    }
    return -1;
  }

  static void let_go(Held& held, Keeps& settled) {
    held.state = State::free;
    if (held.keep != nullptr) settled.push_back(std::move(held.keep));
  }

  // Quarantined slots that no worker can be at any more are free. Where all workers are gone the
  // engine acknowledges for them; those that come later acknowledge the same epoch, untouched.
  bool settle(Keeps& settled) {
    bool any = false;
    for (int i = 0; i < memory_.num_slots(); ++i) {
      Held& held = slots_[static_cast<std::size_t>(i)];
      if (held.state != State::quarantined) continue;
      Slot& slot = memory_.slot(i);
      if (!is_acknowledged(slot, held.epoch)) {
        if (is_served(memory_)) continue;
        shared(slot.acknowledged).store(held.epoch, std::memory_order_release);
      }
      let_go(held, settled);
      any = true;
    }
    return any;
  }

  ChannelMemory& memory_;
  mutable std::mutex mutex_;
  std::vector<Held> slots_;
  int next_ = 0;
};

Channel::Channel(const Geometry& geometry, const std::string& name, std::uint32_t first_epoch) {
  if (first_epoch % 2 != 0) fail(Status::invalid_argument, "first_epoch", "even", "odd");
  memory_ = std::make_shared<ChannelMemory>(geometry, name, first_epoch);
  impl_ = std::make_unique<Impl>(*memory_, first_epoch);
}

Channel::~Channel() = default;

const Geometry& Channel::geometry() const noexcept { return memory_->layout.geometry(); }

std::span<std::byte> Channel::memory() const noexcept {
  return {memory_->memory.data(), memory_->memory.bytes()};
}

bool Channel::has_workers(std::chrono::nanoseconds longest_silence) const {
  if (!is_served(*memory_)) return false;
  const std::int64_t beat =
      std::atomic_ref(memory_->header().heartbeat).load(std::memory_order_relaxed);
  return steady_now().time_since_epoch() - std::chrono::nanoseconds(beat) <= longest_silence;
}

std::optional<Submission> Channel::reserve(const Task& task, std::shared_ptr<const void> keep) {
  check_task(task, geometry().x_bytes, geometry().deltas_bytes);
  Header& header = memory_->header();
  if ((shared(header.workers).load(std::memory_order_acquire) & kServing) == 0) return std::nullopt;
  const std::optional<Submission> submission = impl_->take(std::move(keep));
  if (!submission) return std::nullopt;
  Slot& slot = memory_->slot(submission->slot);
  slot.task = task;
  // On the host a stream sleeps on the reply without telling.
  shared(slot.awaited).store(1, std::memory_order_relaxed);
  shared(slot.announced).store(submission->epoch);
  wake_workers(header);
  return submission;
}

std::optional<Submission> Channel::submit(const Task& task, const void* x, std::int64_t x_stride,
                                          std::shared_ptr<const void> keep) {
  const std::optional<Submission> submission = reserve(task, std::move(keep));
  if (!submission) return std::nullopt;
  Slot& slot = memory_->slot(submission->slot);
  shared(slot.awaited).store(0, std::memory_order_relaxed);
  const std::int64_t row = task.in * static_cast<std::int64_t>(size_of(task.dtype));
  const std::int64_t stride = x_stride * static_cast<std::int64_t>(size_of(task.dtype));
  for (int t = 0; t < task.tokens; ++t) {
    std::memcpy(memory_->layout.x(slot) + t * row, static_cast<const std::byte*>(x) + t * stride,
                static_cast<std::size_t>(row));
  }
  shared(slot.request).store(submission->epoch, std::memory_order_release);
  return submission;
}

std::byte* Channel::x(Submission submission) const {
  impl_->check(submission);
  return memory_->layout.x(memory_->slot(submission.slot));
}

Flag Channel::request(Submission submission) const {
  impl_->check(submission);
  return {&memory_->slot(submission.slot).request, submission.epoch};
}

Flag Channel::reply(Submission submission) const {
  impl_->check(submission);
  return {&memory_->slot(submission.slot).reply, submission.epoch};
}

std::byte* Channel::deltas(Submission submission, bool by_engine) const {
  impl_->check(submission);
  return memory_->layout.deltas(memory_->slot(submission.slot), by_engine);
}

Outcome Channel::await(Submission submission, std::chrono::nanoseconds timeout) const {
  impl_->check(submission);
  Slot& slot = memory_->slot(submission.slot);
  const auto reply = shared(slot.reply);
  const auto is_done = [&] { return since(reply.load(), submission.epoch) >= 0; };
  const SteadyTime deadline = steady_deadline(timeout);
  if (spin_until(std::min(deadline, steady_now() + kSpin), is_done)) return Outcome::done;
  for (;;) {
    // Announced before the last look, as in wake_workers.
    shared(slot.awaited).store(1);
    const std::uint32_t now = reply.load();
    if (since(now, submission.epoch) >= 0) return Outcome::done;
    const bool is_lost = shared(slot.refused).load(std::memory_order_acquire) == submission.epoch ||
                         !is_served(*memory_);
    if (is_lost) return is_done() ? Outcome::done : Outcome::gone;
    const SteadyTime time = steady_now();
    if (time >= deadline) return Outcome::timed_out;
    futex_wait(&slot.reply, now, std::min<std::chrono::nanoseconds>(deadline - time, kLookAfter));
  }
}

void Channel::redo(Submission submission, std::span<const Region> regions) const {
  impl_->check(submission);
  Slot& slot = memory_->slot(submission.slot);
  const auto reply = shared(slot.reply);
  std::uint32_t now = reply.load();
  if (since(now, submission.epoch) >= 0) return;
  if (shared(slot.request).load(std::memory_order_acquire) != submission.epoch) {
    fail(Status::invalid_argument, "redo", "a submission whose request was written", "another");
  }
  check_weights(slot.task, regions);
  compute(slot.task, regions, memory_->layout.x(slot), memory_->layout.deltas(slot, true), 0,
          slot.task.tokens);
  while (since(now, submission.epoch) < 0) {
    if (reply.compare_exchange_weak(now, submission.epoch + 1)) {
      futex_wake(&slot.reply);
      return;
    }
  }
}

const std::byte* Channel::deltas(Submission submission) const {
  impl_->check(submission);
  Slot& slot = memory_->slot(submission.slot);
  const std::uint32_t now = shared(slot.reply).load(std::memory_order_acquire);
  if (since(now, submission.epoch) < 0) {
    fail(Status::invalid_argument, "deltas", "a task that is done", "another");
  }
  return memory_->layout.deltas(slot, now % 2 != 0);
}

void Channel::release(Submission submission) {
  impl_->check(submission);
  impl_->release(submission, is_acknowledged(memory_->slot(submission.slot), submission.epoch));
}

Channel::Stats Channel::stats() { return impl_->stats(); }

}  // namespace toppings::assist
