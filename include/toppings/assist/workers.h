// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/assist/channel.h>
#include <toppings/export.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace toppings::assist {

struct WorkersOptions {
  std::vector<int> cores;    // a thread on each; -1: not pinned
  int tokens_per_core = 16;  // a task is cut into slices of about so many, at most one a thread
  std::chrono::microseconds spin{200};  // without a task; then they sleep
};

// Threads that serve a channel: the only ones, as long as they live. Every one computes by itself,
// without OpenMP, on the adapters' own images.
class TOPPINGS_EXPORT Workers {
 public:
  // In the engine's process. Throws invalid_argument: no cores, one that doesn't exist, a channel
  // that has workers.
  Workers(const Channel& channel, std::vector<Region> regions, WorkersOptions options);

  // In a process of their own, regions by name or path (HostStore's is /proc/PID/fd/N). Throws
  // not_found, format, or as above.
  Workers(const std::string& channel, const std::vector<std::string>& regions,
          WorkersOptions options);

  // Each thread ends its slice; tasks that aren't answered then are left to the engine. Where that
  // is gone, its channel's name goes as well.
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  // Has the engine's process ended, or let go of the channel? For workers of another process.
  bool is_engine_gone() const;

  struct Stats {
    std::int64_t tasks;    // computed
    std::int64_t late;     // of them, after the engine had answered itself
    std::int64_t refused;  // impossible, weights outside of the regions, or no memory for it
    std::int64_t sleeps;
  };
  Stats stats() const;

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
  std::string name_;  // of another process's channel
};

}  // namespace toppings::assist
