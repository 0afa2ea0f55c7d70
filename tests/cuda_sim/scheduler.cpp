// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <bit>
#include <numeric>

#include "machine.h"
#include "sanitizers.h"
#include "text.h"

namespace toppings::cuda::simulator {

const Thread* current = nullptr;

void scheduling_point(Site site) {
  const sim::Ignored ignored;
  sim::machine->scheduling_point(site);
}

void wait_for_others(Site site) {
  const sim::Ignored ignored;
  sim::machine->running->points = 0;
  sim::machine->suspend(sim::State::polling, site);
}

}  // namespace toppings::cuda::simulator

namespace toppings::sim {

Machine* machine = nullptr;

namespace {

constexpr int kMostErrors = 20;
// How often everyone may look again and find nothing new.
constexpr int kMostIdleRounds = 10000;
// Scheduling points of one thread that never waits.
constexpr int kMostPoints = 1 << 20;

}  // namespace

std::uint32_t Random::below(std::uint32_t bound) {
  state_ ^= state_ << 13;
  state_ ^= state_ >> 7;
  state_ ^= state_ << 17;
  return static_cast<std::uint32_t>((state_ >> 32) * bound >> 32);
}

Report run(const std::function<void()>& kernel, const cuda::LaunchConfig& config,
           const Options& options) {
  const Ignored ignored;
  Machine launch(kernel, config, options);
  machine = &launch;
  Report report = launch.run();
  machine = nullptr;
  cuda::simulator::current = nullptr;
  return report;
}

Report Machine::run() {
  if (!check_config()) return std::move(report);
  if (with_tsan()) __tsan_release(&start_clock_);
  order_.resize(std::size_t{config.grid.x} * config.grid.y * config.grid.z);
  std::iota(order_.begin(), order_.end(), 0u);
  if (options.order == Order::reversed) std::reverse(order_.begin(), order_.end());
  if (options.order == Order::random) {
    for (std::size_t i = order_.size(); i > 1; --i) {
      std::swap(order_[i - 1], order_[random.below(static_cast<std::uint32_t>(i))]);
    }
  }
  const std::size_t most =
      config.cooperative ? order_.size() : static_cast<std::size_t>(options.blocks_in_flight);
  while (slots_.size() < std::min(most, order_.size())) {
    slots_.push_back(std::make_unique<Block>());
  }
  while (!failed_) {
    for (auto& slot : slots_) {
      if (slot->alive == 0 && started_ < order_.size()) start_block(*slot);
    }
    if (in_flight_.empty()) break;
    if (options.order == Order::random) {
      run_at_random();
    } else {
      run_in_order();
    }
    if (failed_ || find_deadlock()) break;
    std::erase_if(in_flight_, [&](Block* block) {
      if (block->alive == 0) end_block(*block);
      return block->alive == 0;
    });
    if (!poll_again()) break;
  }
  if (with_tsan()) __tsan_acquire(&end_clock_);
  if (options.count_traffic) traffic.add_to(report);
  return std::move(report);
}

void Machine::resume(Thread& thread) {
  running = &thread;
  cuda::simulator::current = &thread;
  thread.fiber.resume();
  // Polling and whatever is only a scheduling point isn't progress.
  if (thread.state == State::in_collective || thread.state == State::exited) progress_ = true;
}

void Machine::suspend(State state, Site site) {
  Thread& thread = *running;
  thread.state = state;
  thread.site = site;
  if (state != State::ready) thread.owner_warp->ready &= ~(1u << thread.lane);
  thread.fiber.suspend();
}

void Machine::wake(Warp& warp) {
  for (unsigned lane = 0; lane < 32; ++lane) warp.lanes[lane].state = State::ready;
  warp.ready = 0xffffffffu;
}

void Machine::scheduling_point(Site site) {
  if (++running->points > kMostPoints) {
    complain(
        "endless loop: block " + text(running->block) + " thread " +
        std::to_string(running->number) + " passed " + place(site) + " " +
        std::to_string(kMostPoints) +
        " times without waiting: expected yield_while_waiting() in a loop that waits, got none");
    give_up();
  }
  if (options.order == Order::forward) return;
  if (options.order == Order::reversed) return suspend(State::polling, site);
  switch (random.below(4)) {
    case 0:
      return suspend(State::polling, site);  // for as long as anyone else can run
    case 1:
      return suspend(State::ready, site);
    default:
      return;
  }
}

// At most so many lanes, each until it waits.
void Machine::run_lanes(Warp& warp, int most) {
  const unsigned shift = options.order == Order::random ? random.below(32) : 0;
  std::uint32_t lanes = std::rotr(warp.ready, static_cast<int>(shift));
  for (; lanes != 0 && most > 0 && !failed_; --most) {
    const int last = 31 - std::countl_zero(lanes);
    const bool from_above = options.order == Order::reversed ||
                            (options.order == Order::random && random.below(2) == 0);
    const int bit = from_above ? last : std::countr_zero(lanes);
    lanes &= ~(1u << bit);
    resume(warp.lanes[(static_cast<unsigned>(bit) + shift) % 32]);
  }
}

void Machine::run_warp(Warp& warp) {
  while (warp.ready != 0 && !failed_) run_lanes(warp, 32);
}

void Machine::run_in_order() {
  const bool reversed = options.order == Order::reversed;
  for (Block* block : in_flight_) {
    for (bool again = true; again && !failed_;) {
      again = false;
      for (std::size_t i = 0; i < block->warps.size(); ++i) {
        Warp& warp = block->warps[reversed ? block->warps.size() - 1 - i : i];
        again = again || warp.ready != 0;
        run_warp(warp);
      }
    }
  }
}

void Machine::run_at_random() {
  std::vector<Warp*> ready;
  while (!failed_) {
    ready.clear();
    for (Block* block : in_flight_) {
      for (Warp& warp : block->warps) {
        if (warp.ready != 0) ready.push_back(&warp);
      }
    }
    if (ready.empty()) return;
    Warp& warp = *ready[random.below(static_cast<std::uint32_t>(ready.size()))];
    switch (random.below(4)) {
      case 0:
        run_lanes(warp, 1);
        break;
      case 1:
        run_lanes(warp, 32);
        break;
      default:
        run_warp(warp);
    }
  }
}

// Nobody but its own threads can wake a thread in a collective.
bool Machine::find_deadlock() {
  for (const Block* block : in_flight_) {
    bool stuck = block->alive > 0;
    for (unsigned i = 0; stuck && i < block->num_threads; ++i) {
      const State state = block->threads[i].state;
      stuck = state == State::in_collective || state == State::exited;
    }
    if (stuck) {
      complain("deadlock: " + states(*block));
      failed_ = true;
    }
  }
  return failed_;
}

// Everyone who can run has run: those who wait for others look again. False: nothing changes any
// more.
bool Machine::poll_again() {
  idle_rounds_ = progress_ ? 0 : idle_rounds_ + 1;
  progress_ = false;
  if (idle_rounds_ > kMostIdleRounds) {
    std::string error = "no progress:";
    for (const Block* block : in_flight_) error += " " + states(*block) + ";";
    const std::size_t waiting = order_.size() - started_;
    if (waiting > 0) {
      error += " " + std::to_string(waiting) + " blocks have not started: expected at most " +
               std::to_string(in_flight_.size()) + " blocks that wait for each other";
    }
    complain(error);
    return false;
  }
  for (Block* block : in_flight_) {
    for (unsigned i = 0; i < block->num_threads; ++i) {
      Thread& thread = block->threads[i];
      if (thread.state != State::polling) continue;
      thread.state = State::ready;
      thread.owner_warp->ready |= 1u << thread.lane;
    }
  }
  return true;
}

void Machine::give_up() {
  failed_ = true;
  for (;;) running->fiber.suspend();  // never resumed: failed_ ends the launch
}

void Machine::complain(const std::string& key, const std::string& error) {
  if (report.errors.size() < kMostErrors && complaints_.insert(key).second) {
    report.errors.push_back(error);
  }
}

}  // namespace toppings::sim
