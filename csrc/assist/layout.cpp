// SPDX-License-Identifier: Apache-2.0
#include "assist/layout.h"

#include <algorithm>
#include <string>

#include "check.h"
#include "host/futex.h"

namespace toppings::assist {
namespace {

constexpr std::int64_t kMostBytes = std::int64_t{1} << 40;  // of x or deltas: no sum overflows
constexpr int kMostSlots = 4096;

std::size_t lines(std::int64_t bytes) {
  return (static_cast<std::size_t>(bytes) + kLine - 1) / kLine * kLine;
}

const Geometry& checked(const Geometry& geometry) {
  check_positive("num_slots", geometry.num_slots);
  check_index("num_slots", geometry.num_slots, kMostSlots + 1);
  check_positive("x_bytes", geometry.x_bytes);
  check_index("x_bytes", geometry.x_bytes, kMostBytes + 1);
  check_positive("deltas_bytes", geometry.deltas_bytes);
  check_index("deltas_bytes", geometry.deltas_bytes, kMostBytes + 1);
  return geometry;
}

SharedMemory make_memory(const std::string& name, std::size_t bytes) {
  return name.empty() ? SharedMemory(bytes) : SharedMemory(name, bytes);
}

Geometry read_geometry(const SharedMemory& memory, const std::string& name) {
  const auto* header = reinterpret_cast<const Header*>(memory.data());
  if (memory.bytes() < sizeof(Header) || header->magic != kMagic || header->version != kVersion) {
    fail(Status::format, "channel " + name, "version " + std::to_string(kVersion), "another");
  }
  return {.num_slots = header->num_slots,
          .x_bytes = header->x_bytes,
          .deltas_bytes = header->deltas_bytes};
}

}  // namespace

Layout::Layout(const Geometry& geometry)
    : geometry_(checked(geometry)),
      x_bytes_(lines(geometry.x_bytes)),
      deltas_bytes_(lines(geometry.deltas_bytes)),
      slot_bytes_(sizeof(Slot) + x_bytes_ + 2 * deltas_bytes_) {}

ChannelMemory::ChannelMemory(const Geometry& geometry, const std::string& name,
                             std::uint32_t first_epoch)
    : memory(make_memory(name, Layout(geometry).bytes())), layout(geometry) {
  for (int i = 0; i < geometry.num_slots; ++i) {
    Slot& s = slot(i);
    s.request = s.reply = s.acknowledged = s.refused = s.announced = first_epoch;
  }
  Header& head = header();
  head.version = kVersion;
  head.num_slots = geometry.num_slots;
  head.x_bytes = geometry.x_bytes;
  head.deltas_bytes = geometry.deltas_bytes;
  if (memory.is_shared()) memory.lock(kEngineLock);
  // Last: the name is there already, and a worker may be looking.
  std::atomic_ref(head.magic).store(kMagic, std::memory_order_release);
}

ChannelMemory::ChannelMemory(const std::string& name)
    : memory(name, SharedMemory::Access::write), layout(read_geometry(memory, name)) {
  if (memory.bytes() < layout.bytes()) {
    fail(Status::format, "channel " + name, std::to_string(layout.bytes()) + " bytes",
         std::to_string(memory.bytes()));
  }
}

// A worker sets the bit and then looks for announcements; an engine announces and then looks for
// the bit. All four are sequentially consistent, so one of the two sees the other.
void wake_workers(Header& header) {
  const auto word = shared(header.sleep);
  std::uint32_t now = word.load();
  while ((now & 1) != 0) {
    if (!word.compare_exchange_weak(now, now + 1)) continue;
    futex_wake(&header.sleep);
    return;
  }
}

}  // namespace toppings::assist
