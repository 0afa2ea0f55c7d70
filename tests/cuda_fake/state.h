// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "cuda_fake.h"

namespace toppings::cuda_fake {

// A record of an event in a stream.
struct Record {
  bool is_done = false;
  std::chrono::steady_clock::time_point time;
};

struct Event {
  int device;
  std::shared_ptr<Record> last;  // null before the first
};

struct Stream {
  int device;
  std::deque<std::function<void()>> queue;
  std::uint64_t enqueued = 0, finished = 0;
  bool is_closed = false;
  std::thread thread;
};

struct Range {
  std::size_t bytes;
  int device;
};

struct Failure {
  cudaError_t error;
  int after;
};

// Everything, under one lock. Handles are numbers that are never used again.
struct State {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::uintptr_t, std::shared_ptr<Stream>> streams;
  std::map<std::uintptr_t, std::shared_ptr<Event>> events;
  std::map<std::uintptr_t, Range> allocations, locks;
  std::map<std::string, Failure> failures;
  std::map<std::string, int> calls;
  std::array<cudaError_t, kDevices> sticky{};  // what is left of work that failed
  std::uintptr_t last_handle = 0;
};

State& state();

// Counts the call; what it is to fail with.
cudaError_t enter(const std::string& name);

// A program's mistake: fails the test that runs.
cudaError_t mistake(const std::string& what);

}  // namespace toppings::cuda_fake
