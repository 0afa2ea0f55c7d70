// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "sim.h"

namespace toppings::sim {

// When a thread did something, as its block and its warp count barriers. Both numbers only grow.
struct Moment {
  std::uint32_t thread = 0;  // in its block
  std::uint32_t block_barriers = 0;
  std::uint32_t warp_barriers = 0;
};

struct Race {
  std::string places;  // the same for all threads that make the same mistake
  std::string text;
};

// Who touched what of a block's shared memory, two bytes at a time. Two accesses to the same bytes,
// one of them a write, by two threads without a barrier between them are a race, in whatever order
// they happened to run. Only accesses through ptx.cuh are seen. Of the readers the last two are
// remembered.
class Races {
 public:
  void start_block(std::size_t shared_bytes, std::uint32_t block_barriers);
  // The race, if it is one. Offsets and sizes are even, or nothing is checked.
  std::optional<Race> read(std::size_t offset, int bytes, const Moment& now, Site site);
  std::optional<Race> write(std::size_t offset, int bytes, const Moment& now, Site site);
  // A copy writes at any time between its issue and its delivery.
  void issue(std::size_t offset, int bytes, bool in_flight);

 private:
  struct Past {
    Moment moment;
    Site site;
  };
  struct Cell {
    Past writer, reader, other_reader;
    bool in_flight = false;
  };
  bool unordered(const Past& past, const Moment& now) const;

  std::vector<Cell> cells_;
  std::uint32_t first_ = 0;  // older moments belong to an earlier block
};

}  // namespace toppings::sim
