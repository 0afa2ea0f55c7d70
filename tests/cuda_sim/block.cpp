// SPDX-License-Identifier: Apache-2.0
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "machine.h"
#include "sanitizers.h"
#include "text.h"

// The life of a block: its threads and its shared memory.
namespace toppings::sim {
namespace {

constexpr unsigned kMostThreads = 1024;
constexpr std::size_t kMostShared = 227 * 1024;  // what sm_90 and sm_100 grant on request
constexpr unsigned kMostGridYz = 65535;

// Under AddressSanitizer from its allocator, which guards the ends; otherwise fresh pages, so that
// ThreadSanitizer doesn't take blocks that share an address for a race.
std::byte* new_shared(std::size_t bytes) {
  if (with_asan()) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, bytes) != 0) throw std::bad_alloc();
    return static_cast<std::byte*>(memory);
  }
  void* pages =
      mmap(nullptr, bytes + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return static_cast<std::byte*>(pages);
}

void delete_shared(std::byte* memory, std::size_t bytes) {
  if (with_asan()) {
    std::free(memory);
  } else {
    munmap(memory, bytes + 1);
  }
}

}  // namespace

Machine::Machine(const std::function<void()>& kernel, const cuda::LaunchConfig& config,
                 const Options& options)
    : kernel(kernel), config(config), options(options), random(options.seed) {}

Machine::~Machine() {
  for (auto& slot : slots_) {
    if (slot->shared != nullptr) delete_shared(slot->shared, config.shared_bytes);
  }
}

bool Machine::check_config() {
  const cuda::Dim3 grid = config.grid, block = config.block;
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  if (threads == 0 || block.x % 32 != 0 || threads > kMostThreads) {
    complain("block: expected 32 to 1024 threads, a multiple of 32 in x, got " +
             text({block.x, block.y, block.z}));
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > kMostGridYz ||
      grid.z > kMostGridYz) {
    complain("grid: expected 1 to 2^31 - 1, 65535 and 65535, got " +
             text({grid.x, grid.y, grid.z}));
  }
  if (config.shared_bytes > kMostShared) {
    complain("shared memory: expected at most " + std::to_string(kMostShared) + " bytes, got " +
             std::to_string(config.shared_bytes));
  }
  if (options.blocks_in_flight < 1) complain("blocks in flight: expected at least one");
  return report.ok();
}

void Machine::start_block(Block& block) {
  const unsigned linear = order_[started_++];
  block.index = {linear % config.grid.x, linear / config.grid.x % config.grid.y,
                 linear / config.grid.x / config.grid.y};
  const auto [x, y, z] = config.block;
  block.num_threads = block.alive = x * y * z;
  if (block.threads == nullptr) block.threads = std::make_unique<Thread[]>(block.num_threads);
  block.warps.assign(block.num_threads / 32, Warp{});
  block.meeting = {};
  ++block.barriers;
  block.waited_for_previous = block.all_waited_for_previous = false;
  if (block.shared == nullptr) block.shared = new_shared(config.shared_bytes);
  std::memset(block.shared, 0xff, config.shared_bytes);  // NaN in every format, -1 as an integer
  if (options.find_races) block.races.start_block(config.shared_bytes, block.barriers);
  for (unsigned i = 0; i < block.num_threads; ++i) {
    Thread& thread = block.threads[i];
    Warp& warp = block.warps[i / 32];
    if (i % 32 == 0) {
      warp.owner = &block;
      warp.lanes = &thread;
    }
    static_cast<cuda::simulator::Thread&>(thread) = {
        .thread = {i % x, i / x % y, i / x / y},
        .block = block.index,
        .block_size = {x, y, z},
        .grid_size = {config.grid.x, config.grid.y, config.grid.z},
        .lane = i % 32,
        .warp = i / 32,
        .shared = block.shared};
    thread.owner = &block;
    thread.owner_warp = &warp;
    thread.number = i;
    thread.state = State::ready;
    thread.points = thread.groups = 0;
    thread.waited_for_previous = false;
    thread.copies.clear();
    thread.fiber.start(&Machine::thread_main, &thread);
  }
  in_flight_.push_back(&block);
}

void Machine::end_block(Block& block) {
  for (Warp& warp : block.warps) close_requests(warp);
  for (unsigned i = 0; i < block.num_threads; ++i) block.threads[i].fiber.end();
  if (with_tsan()) {
    delete_shared(block.shared, config.shared_bytes);
    block.shared = nullptr;
  }
}

void Machine::thread_main(void* argument) {
  if (with_tsan()) __tsan_acquire(&machine->start_clock_);
  machine->kernel();
  if (with_tsan()) __tsan_release(&machine->end_clock_);
  const Ignored ignored;
  machine->exited(*static_cast<Thread*>(argument));
}

void Machine::exited(Thread& thread) {
  if (!thread.copies.empty()) {
    complain("unfinished",
             "block " + text(thread.block) + " thread " + std::to_string(thread.number) +
                 ": expected wait_copies for every copy before it exits, got none for that of " +
                 place(thread.copies.front().site));
  }
  thread.state = State::exited;
  thread.owner_warp->ready &= ~(1u << thread.lane);
  --thread.owner->alive;
}

void Machine::close_requests(Warp& warp) {
  if (options.count_traffic) traffic.close(warp.open);
}

}  // namespace toppings::sim
