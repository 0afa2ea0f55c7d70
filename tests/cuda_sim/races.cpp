// SPDX-License-Identifier: Apache-2.0
#include "races.h"

#include "text.h"

namespace toppings::sim {
namespace {

Race race(const char* what, std::size_t offset, const Moment& now, Site site, const char* before,
          std::uint32_t other, Site other_site) {
  return {std::string(what) + place(site) + before + place(other_site),
          "race: thread " + std::to_string(now.thread) + " " + what + " shared byte " +
              std::to_string(offset) + " (" + place(site) + "), thread " + std::to_string(other) +
              " " + before + " it (" + place(other_site) +
              "): expected a barrier between, got none"};
}

Race unfinished(const char* what, std::size_t offset, const Moment& now, Site site,
                std::uint32_t other, Site other_site) {
  return {std::string(what) + place(site) + place(other_site),
          "race: thread " + std::to_string(now.thread) + " " + what + " shared byte " +
              std::to_string(offset) + " (" + place(site) + ") while the copy of thread " +
              std::to_string(other) + " (" + place(other_site) +
              ") is on its way: expected wait_copies first, got none"};
}

}  // namespace

void Races::start_block(std::size_t shared_bytes, std::uint32_t block_barriers) {
  cells_.resize(shared_bytes / 2 + 1);
  for (Cell& cell : cells_) cell.in_flight = false;
  first_ = block_barriers;
}

// Barrier counts go on from block to block, so a cell of an earlier block is recognized by them.
bool Races::unordered(const Past& past, const Moment& now) const {
  if (past.moment.block_barriers < first_ || past.moment.thread == now.thread) return false;
  if (past.moment.block_barriers != now.block_barriers) return false;
  const bool same_warp = past.moment.thread / 32 == now.thread / 32;
  return !same_warp || past.moment.warp_barriers == now.warp_barriers;
}

std::optional<Race> Races::read(std::size_t offset, int bytes, const Moment& now, Site site) {
  std::optional<Race> found;
  if (offset % 2 != 0 || bytes % 2 != 0) return found;
  for (std::size_t i = offset / 2; i < (offset + static_cast<std::size_t>(bytes)) / 2; ++i) {
    Cell& cell = cells_[i];
    const Past& writer = cell.writer;
    if (!found && cell.in_flight) {
      found = unfinished("reads", i * 2, now, site, writer.moment.thread, writer.site);
    } else if (!found && unordered(writer, now)) {
      found = race("reads", i * 2, now, site, "wrote", writer.moment.thread, writer.site);
    }
    if (cell.reader.moment.thread != now.thread) cell.other_reader = cell.reader;
    cell.reader = {now, site};
  }
  return found;
}

std::optional<Race> Races::write(std::size_t offset, int bytes, const Moment& now, Site site) {
  std::optional<Race> found;
  if (offset % 2 != 0 || bytes % 2 != 0) return found;
  for (std::size_t i = offset / 2; i < (offset + static_cast<std::size_t>(bytes)) / 2; ++i) {
    Cell& cell = cells_[i];
    if (!found && cell.in_flight) {
      found = unfinished("writes", i * 2, now, site, cell.writer.moment.thread, cell.writer.site);
    }
    if (!found && unordered(cell.writer, now)) {
      found =
          race("writes", i * 2, now, site, "wrote", cell.writer.moment.thread, cell.writer.site);
    }
    for (const Past* reader : {&cell.reader, &cell.other_reader}) {
      if (!found && unordered(*reader, now)) {
        found = race("writes", i * 2, now, site, "read", reader->moment.thread, reader->site);
      }
    }
    cell.writer = {now, site};
  }
  return found;
}

void Races::issue(std::size_t offset, int bytes, bool in_flight) {
  for (std::size_t i = offset / 2; i < (offset + static_cast<std::size_t>(bytes)) / 2; ++i) {
    cells_[i].in_flight = in_flight;
  }
}

}  // namespace toppings::sim
