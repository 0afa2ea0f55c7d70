// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <mutex>
#include <span>

#include "range_allocator.h"

namespace toppings {

// One range of addresses, of which pieces become memory when they are allocated: so everything in
// it can be reached by an offset from one base. Pieces are whole pages, by first fit; touching any
// other page of the range is a fault. Thread-safe.
class HostRegion {
 public:
  // Reserves at least `bytes` of addresses. With `is_shared` the pieces are memory of a file
  // without a name, file(), which other processes may map whole. Throws out_of_memory.
  explicit HostRegion(std::size_t bytes, bool is_shared = false);
  ~HostRegion();
  HostRegion(const HostRegion&) = delete;
  HostRegion& operator=(const HostRegion&) = delete;

  std::span<const std::byte> addresses() const noexcept { return {base_, bytes_}; }
  int file() const noexcept { return file_; }  // -1: this process alone has the memory

  // Zero-filled, on a page boundary; bytes > 0. Throws out_of_memory.
  std::byte* allocate(std::size_t bytes);

  // The memory goes back to the system. bytes: as asked for; a null pointer is ignored.
  void deallocate(std::byte* data, std::size_t bytes) noexcept;

 private:
  std::size_t bytes_;
  int file_;
  std::byte* base_;
  std::mutex mutex_;
  RangeAllocator ranges_;  // guarded by mutex_; in bytes from base_, multiples of a page
};

}  // namespace toppings
