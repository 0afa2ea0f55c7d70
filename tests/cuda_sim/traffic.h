// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <vector>

#include "index_set.h"
#include "sim.h"

namespace toppings::sim {

// The accesses of a warp that aren't complete yet: lanes run one after another, so what a GPU does
// in one request is put together again from (place, how often the lane was there).
struct OpenRequests {
  struct Request {
    std::uint32_t lanes = 0;
    std::array<std::uintptr_t, 32> addresses;
  };
  struct Place {
    const void* site;
    Space space;
    cuda::simulator::Access access;
    int bytes;
    SiteTraffic* totals;
    std::array<std::uint32_t, 32> visits{};  // by lane
    std::uint32_t closed = 0;                // how many requests were counted already
    std::deque<Request> requests{};
  };
  std::vector<Place> places;
  std::size_t last = 0;
};

// What a launch moves.
class Traffic {
 public:
  void record(OpenRequests& open, unsigned lane, std::uintptr_t address, int bytes, Space space,
              cuda::simulator::Access access, Site site);
  // All lanes have come to a collective.
  void close(OpenRequests& open);
  void add_to(Report& report) const;

 private:
  SiteTraffic& totals(Site site, Space space, cuda::simulator::Access access, int bytes);
  void count(const OpenRequests::Place& place, const OpenRequests::Request& request);

  std::deque<SiteTraffic> sites_;
  IndexSet loaded_, stored_, atomic_;
};

}  // namespace toppings::sim
