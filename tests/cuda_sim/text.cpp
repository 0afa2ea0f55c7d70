// SPDX-License-Identifier: Apache-2.0
#include "text.h"

#include <cstdio>

#include "machine.h"

namespace toppings::sim {
namespace {

std::string doing(const Thread& thread) {
  switch (thread.state) {
    case State::ready:
      return "can run";
    case State::in_collective:
      return "wait in " + std::string(name_of(thread.waits_in)) + " (" + place(thread.site) + ")";
    case State::polling:
      return "wait for others (" + place(thread.site) + ")";
    case State::exited:
      return "have exited";
  }
  return {};
}

}  // namespace

std::string place(Site site) {
  const std::string_view file = site.file_name();
  return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(site.line());
}

std::string text(const Index& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string_view name_of(cuda::simulator::Access access) {
  constexpr std::string_view kNames[] = {"load", "constant load", "store", "atomic", "copy"};
  return kNames[static_cast<int>(access)];
}

std::string_view name_of(Collective kind) {
  constexpr std::string_view kNames[] = {"sync_block",        "sync_warp",
                                         "shuffle",           "ballot",
                                         "load_matrix",       "load_matrix_transposed",
                                         "mma_16x8x16<bf16>", "mma_16x8x16<f16>"};
  return kNames[static_cast<int>(kind)];
}

std::string states(const Block& block) {
  std::string result = "block " + text(block.index) + ": ";
  constexpr int kMost = 12;  // groups named
  int groups = 0;
  for (unsigned first = 0; first < block.num_threads;) {
    const std::string what = doing(block.threads[first]);
    unsigned end = first + 1;
    while (end < block.num_threads && doing(block.threads[end]) == what) ++end;
    if (groups++ == kMost) return result + ", ...";
    if (groups > 1) result += ", ";
    result += end == first + 1 ? "thread " + std::to_string(first)
                               : "threads " + std::to_string(first) + "-" + std::to_string(end - 1);
    result += " " + what;
    first = end;
  }
  return result;
}

std::string Report::text() const {
  std::string result;
  for (const std::string& error : errors) result += error + "\n";
  return result;
}

std::string Report::traffic_text() const {
  std::string result;
  for (const SiteTraffic& at : sites) {
    char line[200];
    const std::string where = place(at.site);
    const std::string what(name_of(at.access));
    if (at.space == Space::shared) {
      std::snprintf(line, sizeof line,
                    "%-28s shared %-13s %2d bytes: %8lld requests, %8lld wavefronts (ideal %lld)\n",
                    where.c_str(), what.c_str(), at.bytes,
                    static_cast<long long>(at.shared.requests),
                    static_cast<long long>(at.shared.wavefronts),
                    static_cast<long long>(at.shared.ideal_wavefronts));
    } else {
      std::snprintf(line, sizeof line,
                    "%-28s global %-13s %2d bytes: %8lld requests, %8lld sectors\n", where.c_str(),
                    what.c_str(), at.bytes, static_cast<long long>(at.global.requests),
                    static_cast<long long>(at.global.sectors));
    }
    result += line;
  }
  return result;
}

std::string name_of(const Options& options) {
  constexpr const char* kOrders[] = {"in order", "reversed", "random"};
  constexpr const char* kCopies[] = {"early copies", "late copies", "copies at random"};
  std::string result = kOrders[static_cast<int>(options.order)];
  if (options.order == Order::random) result += " " + std::to_string(options.seed);
  return result + ", " + kCopies[static_cast<int>(options.copies)] + ", " +
         std::to_string(options.blocks_in_flight) + " blocks in flight";
}

std::vector<Options> all_schedules(int random_seeds) {
  std::vector<Options> result;
  for (const Order order : {Order::forward, Order::reversed}) {
    for (const Copies copies : {Copies::early, Copies::late}) {
      result.push_back({.order = order, .copies = copies});
    }
  }
  for (int seed = 1; seed <= random_seeds; ++seed) {
    result.push_back({.order = Order::random,
                      .seed = static_cast<std::uint64_t>(seed),
                      .copies = Copies::random,
                      .blocks_in_flight = 2 + seed});
  }
  return result;
}

}  // namespace toppings::sim
