// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "fiber.h"
#include "races.h"
#include "sim.h"
#include "traffic.h"

// The simulator's state: a launch, its blocks in flight, their warps and threads.
namespace toppings::sim {

using cuda::simulator::Access;
using cuda::simulator::Collective;
using cuda::simulator::Index;

struct Block;
struct Warp;

enum class State : std::uint8_t {
  ready,
  in_collective,
  polling,  // goes on when everyone else is stuck or polling as well
  exited
};

struct PendingCopy {
  cuda::simulator::Copy copy;
  Site site;
  int group;
  bool delivered;
};

struct Thread : cuda::simulator::Thread {
  Block* owner = nullptr;
  Warp* owner_warp = nullptr;
  unsigned number = 0;  // in its block
  State state = State::ready;
  Collective waits_in{};
  Site site{};     // where it waits
  int points = 0;  // scheduling points since it last waited
  int groups = 0;  // of copies, committed
  bool waited_for_previous = false;
  std::vector<PendingCopy> copies;
  Fiber fiber;
};

// Who has come to a collective so far.
struct Meeting {
  unsigned arrived = 0;
  const Thread* first = nullptr;
};

// What lanes hand to each other in one collective. Lanes that are late in reading have until the
// next but one: it can't end without them.
struct Exchange {
  std::array<std::uint32_t, 32> words;                // shuffle, ballot
  std::array<std::array<std::uint32_t, 4>, 32> rows;  // ldmatrix's rows, mma's A
  std::array<std::array<std::uint32_t, 2>, 32> b;
  std::array<std::array<float, 4>, 32> products;
};

struct Warp {
  Block* owner = nullptr;
  Thread* lanes = nullptr;  // 32
  std::uint32_t ready = 0xffffffffu;
  Meeting meeting;
  unsigned collectives = 0;  // completed
  std::uint32_t barriers = 0;
  Exchange exchanges[2];
  char clocks[2];  // addresses for ThreadSanitizer's acquire and release
  OpenRequests open;
};

struct Block {
  Index index;
  unsigned num_threads = 0;
  unsigned alive = 0;
  std::unique_ptr<Thread[]> threads;
  std::vector<Warp> warps;
  std::byte* shared = nullptr;
  Meeting meeting;
  std::uint32_t barriers = 0;
  bool waited_for_previous = false;      // one of its threads
  bool all_waited_for_previous = false;  // by a barrier
  char clocks[2];
  Races races;
};

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  std::uint32_t below(std::uint32_t bound);

 private:
  std::uint64_t state_;
};

class Machine {
 public:
  Machine(const std::function<void()>& kernel, const cuda::LaunchConfig& config,
          const Options& options);
  ~Machine();
  Report run();

  // For the hooks, on the running thread's stack.
  // Of the errors with the same key only the first is reported.
  void complain(const std::string& key, const std::string& error);
  void complain(const std::string& error) { complain(error, error); }
  // The launch ends here. Nothing on the thread's stack is destroyed any more.
  [[noreturn]] void give_up();
  void suspend(State state, Site site);
  void scheduling_point(Site site);
  void wake(Warp& warp);  // its lanes were in a collective
  void close_requests(Warp& warp);

  const std::function<void()>& kernel;
  const cuda::LaunchConfig& config;
  const Options& options;
  Random random;
  Traffic traffic;
  IndexSet constants, written;  // pairs of bytes of global memory
  Report report;
  Thread* running = nullptr;

 private:
  bool check_config();
  void start_block(Block& block);
  void end_block(Block& block);
  void resume(Thread& thread);
  void run_warp(Warp& warp);
  void run_lanes(Warp& warp, int most);
  void run_in_order();
  void run_at_random();
  bool find_deadlock();
  bool poll_again();
  static void thread_main(void* thread);
  void exited(Thread& thread);

  // The launch after what the host did before, and the host after the launch; the order of blocks
  // isn't one to ThreadSanitizer.
  char start_clock_ = 0, end_clock_ = 0;
  std::vector<std::unique_ptr<Block>> slots_;  // of blocks in flight
  std::vector<Block*> in_flight_;
  std::vector<unsigned> order_;  // of the blocks
  std::size_t started_ = 0;
  bool failed_ = false;
  bool progress_ = false;
  int idle_rounds_ = 0;
  std::set<std::string> complaints_;
};

// One launch at a time.
extern Machine* machine;

}  // namespace toppings::sim
