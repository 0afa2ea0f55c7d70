// SPDX-License-Identifier: Apache-2.0
#include <cstdint>

#include "machine.h"
#include "sanitizers.h"
#include "text.h"

// Accesses and copies: checked, ordered, counted. The data itself moves in ptx.cuh.
namespace toppings::sim {
namespace {

void refuse(const char* space, Access access, int bytes, Site site, const std::string& expected,
            const std::string& got) {
  const Thread& thread = *machine->running;
  machine->complain(std::string(space) + " " + std::string(name_of(access)) + " of " +
                    std::to_string(bytes) + " bytes, block " + text(thread.block) + " thread " +
                    std::to_string(thread.number) + " (" + place(site) + "): expected " + expected +
                    ", got " + got);
}

void check_alignment(const char* space, const void* address, int bytes, Access access, Site site) {
  const auto rest = reinterpret_cast<std::uintptr_t>(address) % static_cast<unsigned>(bytes);
  if (rest != 0) {
    refuse(space, access, bytes, site, "a multiple of its size", std::to_string(rest) + " over");
    machine->give_up();
  }
}

std::size_t check_shared(const void* address, int bytes, Access access, Site site) {
  const auto first = reinterpret_cast<std::uintptr_t>(machine->running->shared);
  const auto offset = reinterpret_cast<std::uintptr_t>(address) - first;  // wraps around below
  const std::size_t size = machine->config.shared_bytes;
  if (offset > size || size - offset < static_cast<std::size_t>(bytes)) {
    refuse("shared", access, bytes, site, "an offset within " + std::to_string(size) + " bytes",
           std::to_string(static_cast<std::intptr_t>(offset)));
    machine->give_up();
  }
  check_alignment("shared", address, bytes, access, site);
  return offset;
}

void check_previous(const Memory& memory, Access access, int bytes, Site site) {
  if (!memory.of_previous || !machine->config.overlaps_previous) return;
  const Thread& thread = *machine->running;
  if (thread.waited_for_previous || thread.owner->all_waited_for_previous) return;
  refuse("global", access, bytes, site,
         "wait_for_previous_kernel() before any access to " + memory.name, "none");
  machine->give_up();
}

void check_global(const void* address, int bytes, Access access, Site site) {
  if (machine->options.memory.empty()) return;
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  const Memory* nearest = nullptr;
  std::intptr_t nearest_offset = 0;
  for (const Memory& memory : machine->options.memory) {
    const auto offset =
        static_cast<std::intptr_t>(first - reinterpret_cast<std::uintptr_t>(memory.address));
    const auto size = static_cast<std::intptr_t>(memory.bytes);
    if (offset >= 0 && offset + bytes <= size) {
      check_previous(memory, access, bytes, site);
      return;
    }
    const auto distance = [](std::intptr_t at, std::intptr_t end) {
      return at < 0 ? -at : at - end;
    };
    if (nearest == nullptr ||
        distance(offset, size) <
            distance(nearest_offset, static_cast<std::intptr_t>(nearest->bytes))) {
      nearest = &memory;
      nearest_offset = offset;
    }
  }
  refuse("global", access, bytes, site, "an address within the kernel's memory",
         "offset " + std::to_string(nearest_offset) + " of the " + std::to_string(nearest->bytes) +
             " bytes of " + nearest->name);
  machine->give_up();
}

Moment now(const Thread& thread) {
  return {thread.number, thread.owner->barriers, thread.owner_warp->barriers};
}

void check_race(std::size_t offset, int bytes, bool writes, Site site) {
  if (!machine->options.find_races) return;
  Thread& thread = *machine->running;
  Races& races = thread.owner->races;
  const auto found = writes ? races.write(offset, bytes, now(thread), site)
                            : races.read(offset, bytes, now(thread), site);
  if (found) {
    machine->complain(found->places, "block " + text(thread.block) + ": " + found->text);
  }
}

void count(const void* address, int bytes, Space space, Access access, Site site) {
  if (!machine->options.count_traffic) return;
  const Thread& thread = *machine->running;
  machine->traffic.record(thread.owner_warp->open, thread.lane,
                          reinterpret_cast<std::uintptr_t>(address), bytes, space, access, site);
}

// The caches behind constant loads don't see what the kernel writes, not even after a barrier.
void check_constant(const void* address, int bytes, Access access, Site site) {
  if (access == Access::load || access == Access::copy) return;
  const bool loads = access == Access::load_constant;
  const auto first = reinterpret_cast<std::uintptr_t>(address);
  for (auto pair = first / 2; pair * 2 < first + static_cast<std::uintptr_t>(bytes); ++pair) {
    (loads ? machine->constants : machine->written).insert(pair);
    if ((loads ? machine->written : machine->constants).contains(pair)) {
      machine->complain(
          "constant" + place(site),
          "global " + std::string(name_of(access)) + ", block " + text(machine->running->block) +
              " thread " + std::to_string(machine->running->number) + " (" + place(site) +
              "): expected load_global_coherent for what the kernel itself writes, got a constant "
              "load");
      return;
    }
  }
}

std::size_t offset_in_shared(const void* address) {
  return static_cast<std::size_t>(static_cast<const std::byte*>(address) -
                                  machine->running->shared);
}

}  // namespace
}  // namespace toppings::sim

namespace toppings::cuda::simulator {

using namespace toppings::sim;

void access_shared(const void* address, int bytes, Access access, Site site) {
  const Ignored ignored;
  const std::size_t offset = check_shared(address, bytes, access, site);
  check_race(offset, bytes, access != Access::load, site);
  count(address, bytes, Space::shared, access, site);
}

void access_global(const void* address, int bytes, Access access, Site site) {
  const Ignored ignored;
  check_alignment("global", address, bytes, access, site);
  check_global(address, bytes, access, site);
  if (machine->options.find_races) check_constant(address, bytes, access, site);
  count(address, bytes, Space::global, access, site);
}

void access_any(const void* address, int bytes, Access access, Site site) {
  if (current == nullptr) return;
  const bool is_shared = offset_in_shared(address) < machine->config.shared_bytes;
  (is_shared ? access_shared : access_global)(address, bytes, access, site);
}

void access_copy(const void* shared, const void* global, int bytes, int valid_bytes, Site site) {
  const Ignored ignored;
  access_shared(shared, bytes, Access::copy, site);
  if (valid_bytes < 0 || valid_bytes > bytes) {
    refuse("global", Access::copy, bytes, site, "0 to " + std::to_string(bytes) + " valid bytes",
           std::to_string(valid_bytes));
    machine->give_up();
  }
  if (valid_bytes == 0) return;
  check_alignment("global", global, bytes, Access::copy, site);
  check_global(global, valid_bytes, Access::copy, site);
  count(global, bytes, Space::global, Access::copy, site);
}

bool issue_copy(const Copy& copy, Site site) {
  const Ignored ignored;
  sim::Thread& thread = *machine->running;
  const Copies when = machine->options.copies;
  const bool at_once =
      when == Copies::early || (when == Copies::random && machine->random.below(2) == 0);
  thread.copies.push_back({copy, site, thread.groups, at_once});
  if (machine->options.find_races) {
    thread.owner->races.issue(offset_in_shared(copy.shared), copy.bytes, true);
  }
  return at_once;
}

void wait_for_previous_kernel() {
  machine->running->waited_for_previous = true;
  machine->running->owner->waited_for_previous = true;
}

void commit_copies() { ++machine->running->groups; }

bool next_delivery(int groups_left, Copy& copy) {
  const Ignored ignored;
  sim::Thread& thread = *machine->running;
  auto& copies = thread.copies;
  while (!copies.empty() && copies.front().group < thread.groups - groups_left) {
    const PendingCopy first = copies.front();
    copies.erase(copies.begin());
    if (machine->options.find_races) {
      const std::size_t offset = offset_in_shared(first.copy.shared);
      thread.owner->races.issue(offset, first.copy.bytes, false);
      check_race(offset, first.copy.bytes, true, first.site);
    }
    if (first.delivered) continue;
    copy = first.copy;
    return true;
  }
  return false;
}

}  // namespace toppings::cuda::simulator
