// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

#include "cuda/launch_config.h"
#include "cuda/simulator.h"

// Runs a kernel written with cuda/ptx.cuh on the CPU and tells what is wrong with it. One fiber per
// thread, one OS thread; the same options give the same run.
namespace toppings::sim {

using Site = cuda::simulator::Site;

// Which thread runs next. Forward: a warp runs until it waits, the lowest first, and so do the
// lanes in it and the blocks. Reversed: the highest first. Both are extreme on purpose, everyone
// gets as far ahead of the others as the barriers let him; between blocks they are opposites:
// forward a block gives way to others only when it waits, reversed at every atomic. Random: steps
// of random length.
enum class Order : std::uint8_t { forward, reversed, random };

// When a cp.async arrives: when issued, as late as the waits allow, or either at random. Until then
// its destination holds poison.
enum class Copies : std::uint8_t { early, late, random };

struct Memory {
  const void* address;
  std::size_t bytes;
  std::string name;
  // The kernel before may still be at work on it: with LaunchConfig::overlaps_previous no thread
  // may touch it that hasn't waited for that kernel, or passed a barrier with one that has.
  bool of_previous = false;
};

struct Options {
  Order order = Order::forward;
  std::uint64_t seed = 1;
  Copies copies = Copies::late;
  int blocks_in_flight = 4;
  // Where the kernel may access global memory; empty: anywhere.
  std::vector<Memory> memory = {};
  // Checks, whatever the schedule, that barriers order the accesses to shared memory, and that
  // load_global reads nothing that the launch writes. Only accesses through ptx.cuh are seen.
  bool find_races = true;
  bool count_traffic = true;
};

// In order, reversed and random, with early and late copies: what a kernel's test should run.
std::vector<Options> all_schedules(int random_seeds = 2);
std::string name_of(const Options& options);

// A request is one instruction of a warp. Lanes that come to the same place equally often since the
// warp's last collective count as one request.
struct SharedTraffic {
  std::int64_t requests = 0;
  std::int64_t wavefronts = 0;
  std::int64_t ideal_wavefronts = 0;  // without bank conflicts

  SharedTraffic& operator+=(const SharedTraffic& other);
};
struct GlobalTraffic {
  std::int64_t requests = 0;
  std::int64_t sectors = 0;           // of 32 bytes, summed over the requests
  std::int64_t distinct_sectors = 0;  // of the whole launch

  GlobalTraffic& operator+=(const GlobalTraffic& other);
};

enum class Space : std::uint8_t { shared, global };

struct SiteTraffic {
  Site site;
  Space space = Space::shared;
  cuda::simulator::Access access = cuda::simulator::Access::load;
  int bytes = 0;  // per lane
  SharedTraffic shared;
  GlobalTraffic global;  // distinct_sectors isn't counted per site
};

struct Report {
  std::vector<std::string> errors;
  SharedTraffic shared_loads, shared_stores, shared_copies;   // loads: ldmatrix too
  GlobalTraffic global_loads, global_stores, global_atomics;  // loads: cp.async too
  std::vector<SiteTraffic> sites;
  std::int64_t barriers = 0, warp_collectives = 0;

  bool ok() const { return errors.empty(); }
  std::string text() const;          // the errors, one a line
  std::string traffic_text() const;  // one line per place in the kernel
  // Of one launch after another.
  Report& operator+=(const Report& other);
};

Report run(const std::function<void()>& kernel, const cuda::LaunchConfig& config,
           const Options& options);

template <class... Parameters, class... Args>
Report launch(void (*kernel)(Parameters...), const cuda::LaunchConfig& config,
              const Options& options, const Args&... args) {
  return run([&] { kernel(static_cast<Parameters>(args)...); }, config, options);
}

}  // namespace toppings::sim
