// SPDX-License-Identifier: Apache-2.0
#include "traffic.h"

#include <algorithm>
#include <bit>

namespace toppings::sim {
namespace {

using cuda::simulator::Access;

constexpr std::uintptr_t kSector = 32;
constexpr unsigned kBanks = 32;

// A wavefront moves one 4-byte word per bank. Lanes with 8 or 16 bytes take turns, a half or a
// quarter of the warp at a time; lanes that want the same word share it.
void count_wavefronts(const OpenRequests::Request& request, int bytes, SharedTraffic& totals) {
  const unsigned turn = bytes <= 4 ? 32 : 128 / static_cast<unsigned>(bytes);
  for (unsigned first = 0; first < 32; first += turn) {
    std::uint32_t words[kBanks][32];
    std::uint8_t counts[kBanks] = {};
    int wavefronts = 0;
    for (unsigned lane = first; lane < first + turn; ++lane) {
      if ((request.lanes >> lane & 1) == 0) continue;
      const auto end = static_cast<std::uint32_t>(request.addresses[lane]) + bytes;
      for (std::uint32_t word = static_cast<std::uint32_t>(request.addresses[lane]) / 4;
           word * 4 < end; ++word) {
        auto& seen = words[word % kBanks];
        std::uint8_t& count = counts[word % kBanks];
        if (std::find(seen, seen + count, word) != seen + count) continue;
        seen[count++] = word;
        wavefronts = std::max<int>(wavefronts, count);
      }
    }
    totals.wavefronts += wavefronts;
    totals.ideal_wavefronts += wavefronts > 0;
  }
  ++totals.requests;
}

}  // namespace

SharedTraffic& SharedTraffic::operator+=(const SharedTraffic& other) {
  requests += other.requests;
  wavefronts += other.wavefronts;
  ideal_wavefronts += other.ideal_wavefronts;
  return *this;
}

GlobalTraffic& GlobalTraffic::operator+=(const GlobalTraffic& other) {
  requests += other.requests;
  sectors += other.sectors;
  distinct_sectors += other.distinct_sectors;
  return *this;
}

Report& Report::operator+=(const Report& other) {
  errors.insert(errors.end(), other.errors.begin(), other.errors.end());
  sites.insert(sites.end(), other.sites.begin(), other.sites.end());
  shared_loads += other.shared_loads;
  shared_stores += other.shared_stores;
  shared_copies += other.shared_copies;
  global_loads += other.global_loads;
  global_stores += other.global_stores;
  global_atomics += other.global_atomics;
  barriers += other.barriers;
  warp_collectives += other.warp_collectives;
  return *this;
}

void Traffic::record(OpenRequests& open, unsigned lane, std::uintptr_t address, int bytes,
                     Space space, Access access, Site site) {
  const auto* key = std::bit_cast<const void*>(site);
  const auto is = [&](const OpenRequests::Place& place) {
    return place.site == key && place.bytes == bytes && place.access == access &&
           place.space == space;
  };
  // Lanes visit the places in the same order again and again: the next one is the likeliest.
  std::size_t i = open.last;
  std::size_t tried = 0;
  for (; tried < open.places.size(); ++tried) {
    if (++i >= open.places.size()) i = 0;
    if (is(open.places[i])) break;
  }
  if (tried == open.places.size()) {
    i = open.places.size();
    open.places.push_back({key, space, access, bytes, &totals(site, space, access, bytes)});
  }
  open.last = i;

  OpenRequests::Place& place = open.places[i];
  const std::uint32_t visit = place.visits[lane]++ - place.closed;
  if (visit == place.requests.size()) place.requests.emplace_back();
  OpenRequests::Request& request = place.requests[visit];
  request.lanes |= 1u << lane;
  request.addresses[lane] = address;
  while (!place.requests.empty() && place.requests.front().lanes == 0xffffffffu) {
    count(place, place.requests.front());
    place.requests.pop_front();
    ++place.closed;
  }
}

void Traffic::close(OpenRequests& open) {
  for (OpenRequests::Place& place : open.places) {
    for (const OpenRequests::Request& request : place.requests) count(place, request);
    place.requests.clear();
    place.visits.fill(0);
    place.closed = 0;
  }
}

SiteTraffic& Traffic::totals(Site site, Space space, Access access, int bytes) {
  for (SiteTraffic& known : sites_) {
    if (std::bit_cast<const void*>(known.site) == std::bit_cast<const void*>(site) &&
        known.space == space && known.access == access && known.bytes == bytes) {
      return known;
    }
  }
  sites_.push_back({site, space, access, bytes, {}, {}});
  return sites_.back();
}

void Traffic::count(const OpenRequests::Place& place, const OpenRequests::Request& request) {
  if (place.space == Space::shared) {
    count_wavefronts(request, place.bytes, place.totals->shared);
    return;
  }
  auto& all = place.access == Access::store    ? stored_
              : place.access == Access::atomic ? atomic_
                                               : loaded_;
  std::uintptr_t sectors[32];
  int count = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((request.lanes >> lane & 1) == 0) continue;
    const std::uintptr_t sector = request.addresses[lane] / kSector;  // accesses don't cross one
    if (std::find(sectors, sectors + count, sector) != sectors + count) continue;
    sectors[count++] = sector;
    all.insert(sector);
  }
  ++place.totals->global.requests;
  place.totals->global.sectors += count;
}

void Traffic::add_to(Report& report) const {
  for (const SiteTraffic& site : sites_) {
    report.sites.push_back(site);
    if (site.space == Space::shared) {
      (site.access == Access::copy    ? report.shared_copies
       : site.access == Access::store ? report.shared_stores
                                      : report.shared_loads) += site.shared;
    } else {
      (site.access == Access::store    ? report.global_stores
       : site.access == Access::atomic ? report.global_atomics
                                       : report.global_loads) += site.global;
    }
  }
  report.global_loads.distinct_sectors = loaded_.size();
  report.global_stores.distinct_sectors = stored_.size();
  report.global_atomics.distinct_sectors = atomic_.size();
}

}  // namespace toppings::sim
