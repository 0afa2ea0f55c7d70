// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// What is said of a load, and of a loader.
namespace toppings {

enum class LoadPriority : std::uint8_t { prefetch = 0, normal = 1, urgent = 2 };

enum class LoadStatus : std::uint8_t { loading, loaded, cancelled, failed };

struct LayerTimes {
  double queued;    // seconds from load() until the copy was enqueued; 0 when nothing was copied
  double transfer;  // seconds the copy took on the device, once the one before it was through
  std::int64_t bytes;
};

struct LoaderOptions {
  int num_streams = 2;           // loads under way take turns on them
  double window_seconds = 3e-4;  // worth of copies enqueued ahead (two at least)
  int cpu = -1;                  // the core its thread is pinned to; -1: not pinned
};

struct LoaderStats {
  std::int64_t loads;  // begun
  std::int64_t cancelled, failed;
  std::int64_t layers;        // copied
  std::int64_t bytes;         // copied
  double transfer_seconds;    // of those copies on the device
  double queued_seconds;      // of those copies, summed
  double bytes_per_second;    // of the link, as measured lately; 0 before the first copy
  std::int64_t queued_bytes;  // of loads under way, not yet there
};

}  // namespace toppings
