// SPDX-License-Identifier: Apache-2.0
#include "state.h"

#include <gtest/gtest.h>

namespace toppings::cuda_fake {

State& state() {
  static auto& state = *new State;  // as a driver, it stays until the process has ended
  return state;
}

cudaError_t enter(const std::string& name) {
  const std::lock_guard lock(state().mutex);
  ++state().calls[name];
  const auto found = state().failures.find(name);
  if (found == state().failures.end() || found->second.after-- > 0) return cudaSuccess;
  const cudaError_t error = found->second.error;
  state().failures.erase(found);
  return error;
}

cudaError_t mistake(const std::string& what) {
  ADD_FAILURE() << "a mistake in the use of CUDA: " << what;
  return cudaErrorInvalidValue;
}

void fail_call(const std::string& name, cudaError_t error, int after) {
  const std::lock_guard lock(state().mutex);
  state().failures[name] = {error, after};
}

void heal() {
  const std::lock_guard lock(state().mutex);
  state().failures.clear();
  state().sticky.fill(cudaSuccess);
}

Live live() {
  const std::lock_guard lock(state().mutex);
  const State& now = state();
  return {now.allocations.size(), now.locks.size(), now.streams.size(), now.events.size()};
}

int calls(const std::string& name) {
  const std::lock_guard lock(state().mutex);
  return state().calls[name];
}

}  // namespace toppings::cuda_fake
