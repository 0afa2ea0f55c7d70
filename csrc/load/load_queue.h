// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "load/load_state.h"

namespace toppings {

// The loads under way, and which of them may copy next. Pure policy, no device. Not thread-safe.
//
// What somebody waits for goes before what nobody does, then higher priorities before lower ones;
// equals share by bytes: the one that was served least is next. All copies of a load that are in
// flight are in one stream, so that its layers arrive in order and the first one isn't slowed down
// by the second; different loads use different streams.
class LoadQueue {
 public:
  void add(std::shared_ptr<LoadState> load);
  void remove(const LoadState& load);

  const std::vector<std::shared_ptr<LoadState>>& loads() const noexcept { return loads_; }

  // The load whose next layer goes to this stream; null when none may.
  std::shared_ptr<LoadState> next(int stream) const;

  // How many loads share the link with this one, itself included.
  int sharers(const LoadState& load) const;

 private:
  std::vector<std::shared_ptr<LoadState>> loads_;
};

}  // namespace toppings
