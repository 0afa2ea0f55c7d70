// SPDX-License-Identifier: Apache-2.0
#include <toppings/assist/workers.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <thread>
#include <utility>

#include "assist/compute.h"
#include "assist/layout.h"
#include "assist/shared_memory.h"
#include "assist/slices.h"
#include "check.h"
#include "host/affinity.h"
#include "host/futex.h"
#include "host/spin.h"

namespace toppings::assist {
namespace {

// Of the first thread, which gives the sign of life, and of the others.
constexpr std::chrono::nanoseconds kBeat = Channel::kHeartbeat;
constexpr std::chrono::nanoseconds kLongestSleep = std::chrono::seconds(1);

}  // namespace

class Workers::Impl {
 public:
  Impl(std::shared_ptr<ChannelMemory> channel, std::vector<Region> regions,
       std::vector<std::unique_ptr<SharedMemory>> mappings, WorkersOptions options)
      : channel_(std::move(channel)),
        mappings_(std::move(mappings)),
        regions_(std::move(regions)),
        options_(std::move(options)),
        slices_(static_cast<std::size_t>(channel_->num_slots())) {
    check_positive("number of cores", std::ssize(options_.cores));
    check_positive("tokens_per_core", options_.tokens_per_core);
    for (const int core : options_.cores) check_cpu("core", core);
    arrive();
    try {
      for (std::size_t i = 0; i < options_.cores.size(); ++i) {
        threads_.emplace_back([this, i] { serve(static_cast<int>(i)); });
      }
    } catch (...) {
      leave();
      throw;
    }
  }

  ~Impl() { leave(); }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  bool is_engine_gone() const {
    return channel_->memory.is_shared() && !channel_->memory.is_locked_elsewhere(kEngineLock);
  }

  Stats stats() const {
    return {.tasks = tasks_, .late = late_, .refused = refused_, .sleeps = sleeps_};
  }

 private:
  // ---- coming and going

  // Alone from here on, this group acknowledges what its predecessors left, without a look at it:
  // the engine may have given it up, and its weights too.
  void arrive() {
    const SharedMemory& memory = channel_->memory;
    bool is_alone = !channel_->has_own_workers.exchange(true);
    if (is_alone && memory.is_shared() && !memory.lock(kWorkersLock)) {
      channel_->has_own_workers = false;
      is_alone = false;
    }
    if (!is_alone) fail(Status::invalid_argument, "channel", "one without workers", "one with");
    for (int i = 0; i < channel_->num_slots(); ++i) {
      Slot& slot = channel_->slot(i);
      const std::uint32_t epoch = shared(slot.request).load(std::memory_order_acquire);
      acknowledge_unread(slot, epoch);
      slices_[static_cast<std::size_t>(i)].reset(epoch);
    }
    beat();
    const auto workers = shared(channel_->header().workers);
    workers.store((workers.load() | kServing) + 2);
  }

  void leave() noexcept {
    stops_.store(true);
    wake_workers(channel_->header());
    for (std::thread& thread : threads_) thread.join();
    const auto workers = shared(channel_->header().workers);
    workers.store(workers.load() & ~kServing);
    if (channel_->memory.is_shared()) channel_->memory.unlock(kWorkersLock);
    channel_->has_own_workers = false;
  }

  void beat() {
    std::atomic_ref(channel_->header().heartbeat)
        .store(std::chrono::nanoseconds(steady_now().time_since_epoch()).count(),
               std::memory_order_relaxed);
  }

  // ---- a thread

  void serve(int thread) {
    pin_this_thread(options_.cores[static_cast<std::size_t>(thread)]);
    int slot = 0;  // where the thread last found something: requests come in ring order
    SteadyTime idle_since = steady_now();
    while (!stops_.load(std::memory_order_relaxed)) {
      if (spin_until(steady_now() + kSpin, [&] { return work(slot); })) {
        idle_since = steady_now();
      } else if (steady_now() - idle_since >= options_.spin) {
        rest(thread == 0 ? kBeat : kLongestSleep);
      }
      if (thread == 0) beat();
    }
  }

  // Nothing is asked for now. Where something was announced, it may come at any moment.
  void rest(std::chrono::nanoseconds longest) {
    if (is_announced()) {
      std::this_thread::yield();
      return;
    }
    const std::uint32_t asleep = shared(channel_->header().sleep).fetch_or(1) | 1;
    if (is_announced() || stops_.load()) return;
    sleeps_.fetch_add(1, std::memory_order_relaxed);
    futex_wait(&channel_->header().sleep, asleep, longest);
  }

  bool is_announced() const {
    for (int i = 0; i < channel_->num_slots(); ++i) {
      Slot& slot = channel_->slot(i);
      if (shared(slot.announced).load() != shared(slot.acknowledged).load()) return true;
    }
    return false;
  }

  // ---- a task

  // Takes one slice, from this slot or the next that has any.
  bool work(int& slot) {
    for (int i = 0; i < channel_->num_slots(); ++i) {
      if (take(slot)) return true;
      slot = slot + 1 == channel_->num_slots() ? 0 : slot + 1;
    }
    return false;
  }

  bool take(int index) {
    Slot& slot = channel_->slot(index);
    Slices& slices = slices_[static_cast<std::size_t>(index)];
    const std::uint32_t request = shared(slot.request).load(std::memory_order_acquire);
    if (slices.try_open(request)) open(slot, slices, request);
    const std::optional<std::uint32_t> part = slices.take();
    if (!part) return false;

    const Task& task = slices.task();
    const std::int64_t first = std::int64_t{task.tokens} * *part / slices.count();
    const std::int64_t end = std::int64_t{task.tokens} * (*part + 1) / slices.count();
    try {
      compute(task, regions_, channel_->layout.x(slot), channel_->layout.deltas(slot, false), first,
              end - first);
    } catch (const std::bad_alloc&) {
      slices.fail();
    }
    const std::uint32_t epoch = slices.epoch();
    if (!slices.finish()) return true;
    if (slices.has_failed()) {
      refuse(slot, epoch);
    } else {
      answer(slot, epoch);
    }
    return true;
  }

  void open(Slot& slot, Slices& slices, std::uint32_t epoch) {
    const Task task = slot.task;
    try {
      const Geometry& geometry = channel_->layout.geometry();
      check_task(task, geometry.x_bytes, geometry.deltas_bytes);
      check_weights(task, regions_);
    } catch (const Error&) {
      slices.open(epoch, task, 0);
      refuse(slot, epoch);
      return;
    }
    const std::int64_t tokens = std::max(task.tokens, 1);
    const std::int64_t wanted = (tokens + options_.tokens_per_core - 1) / options_.tokens_per_core;
    slices.open(epoch, task,
                static_cast<std::uint32_t>(std::min(wanted, std::ssize(options_.cores))));
  }

  // Where the epoch was answered before, that stands.
  static void acknowledge_unread(Slot& slot, std::uint32_t epoch) {
    shared(slot.refused).store(epoch, std::memory_order_release);
    shared(slot.acknowledged).store(epoch, std::memory_order_release);
  }

  void refuse(Slot& slot, std::uint32_t epoch) {
    refused_.fetch_add(1, std::memory_order_relaxed);
    acknowledge_unread(slot, epoch);
  }

  // First the acknowledgement, after which nothing but the reply is touched; a reply that comes too
  // late, perhaps for a slot that has been used again, finds a later epoch and changes nothing.
  void answer(Slot& slot, std::uint32_t epoch) {
    tasks_.fetch_add(1, std::memory_order_relaxed);
    shared(slot.acknowledged).store(epoch, std::memory_order_release);
    const auto reply = shared(slot.reply);
    std::uint32_t now = reply.load(std::memory_order_relaxed);
    bool is_first = false;
    while (!is_first && since(now, epoch) < 0) is_first = reply.compare_exchange_weak(now, epoch);
    if (is_first && shared(slot.awaited).load() != 0) futex_wake(&slot.reply);
    if (!is_first) late_.fetch_add(1, std::memory_order_relaxed);
  }

  const std::shared_ptr<ChannelMemory> channel_;
  const std::vector<std::unique_ptr<SharedMemory>> mappings_;
  const std::vector<Region> regions_;
  const WorkersOptions options_;
  std::vector<Slices> slices_;  // [num_slots]
  std::atomic<bool> stops_{false};
  std::atomic<std::int64_t> tasks_{0}, late_{0}, refused_{0}, sleeps_{0};
  std::vector<std::thread> threads_;
};

Workers::Workers(const Channel& channel, std::vector<Region> regions, WorkersOptions options)
    : impl_(std::make_unique<Impl>(channel.memory_, std::move(regions),
                                   std::vector<std::unique_ptr<SharedMemory>>(),
                                   std::move(options))) {}

Workers::Workers(const std::string& channel, const std::vector<std::string>& regions,
                 WorkersOptions options) {
  name_ = channel;
  auto memory = std::make_shared<ChannelMemory>(channel);
  std::vector<std::unique_ptr<SharedMemory>> mappings;
  std::vector<Region> mapped;
  for (const std::string& region : regions) {
    mappings.push_back(std::make_unique<SharedMemory>(region, SharedMemory::Access::read));
    mapped.push_back(
        {mappings.back()->data(), static_cast<std::int64_t>(mappings.back()->bytes())});
  }
  impl_ = std::make_unique<Impl>(std::move(memory), std::move(mapped), std::move(mappings),
                                 std::move(options));
}

Workers::~Workers() {
  const bool is_orphan = !name_.empty() && is_engine_gone();
  impl_.reset();
  if (is_orphan) SharedMemory::remove(name_);
}

bool Workers::is_engine_gone() const { return impl_->is_engine_gone(); }

Workers::Stats Workers::stats() const { return impl_->stats(); }

}  // namespace toppings::assist
