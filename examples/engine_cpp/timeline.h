// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

// What became of one layer; seconds since the load was asked for.
struct LayerEvents {
  std::int64_t bytes;
  double queued;    // its copy was given to the device
  double transfer;  // what the copy took
  double arrived;
  double begin, end;  // of the computation
};

// One line per layer, with a bar: '.' queued, '=' under way on the link, '#' computing.
void print_timeline(const std::vector<LayerEvents>& layers);
