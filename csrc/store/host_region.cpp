// SPDX-License-Identifier: Apache-2.0
#include "store/host_region.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "check.h"

namespace toppings {
namespace {

// A huge page needs one whole and aligned inside a piece, so it never takes more than the piece;
// below this size there is none.
constexpr std::size_t kHugePage = std::size_t{2} << 20;

constexpr int kReservedRanges = 1024;  // more are fine, and take memory then

// NORESERVE: reserved addresses don't count as memory that may be asked for.
int reserve_flags(int file) {
  return (file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED) | MAP_NORESERVE;
}

std::size_t page_bytes() noexcept { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }

std::size_t rounded_up(std::size_t bytes, std::size_t unit) noexcept {
  return (bytes + unit - 1) / unit * unit;
}

// All of it a hole: no memory until it is touched.
int make_file(std::size_t bytes) {
  const int file = memfd_create("toppings images", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) {
    if (file >= 0) close(file);
    fail(Status::out_of_memory, "shared memory", std::to_string(bytes) + " bytes", "none");
  }
  return file;
}

std::byte* reserve(std::size_t bytes, int file) {
  void* data = mmap(nullptr, bytes, PROT_NONE, reserve_flags(file), file, 0);
  if (data == MAP_FAILED) {
    if (file >= 0) close(file);
    fail(Status::out_of_memory, "address space", std::to_string(bytes) + " bytes", "none");
  }
  return static_cast<std::byte*>(data);
}

}  // namespace

HostRegion::HostRegion(std::size_t bytes, bool is_shared)
    : bytes_(rounded_up(bytes, kHugePage)),
      file_(is_shared ? make_file(bytes_) : -1),
      base_(reserve(bytes_, file_)),
      ranges_(static_cast<std::int64_t>(bytes_), kReservedRanges) {}

HostRegion::~HostRegion() {
  munmap(base_, bytes_);
  if (file_ >= 0) close(file_);
}

std::byte* HostRegion::allocate(std::size_t bytes) {
  const std::size_t need = rounded_up(bytes, page_bytes());
  std::optional<std::int64_t> offset;
  {
    const std::lock_guard lock(mutex_);
    offset = ranges_.allocate(static_cast<std::int64_t>(need), 0);
    if (!offset) {
      fail(Status::out_of_memory, "host store's addresses", std::to_string(need) + " in a row",
           "at most " + std::to_string(ranges_.largest_free()) + " between the images");
    }
  }
  std::byte* data = base_ + *offset;
  if (mprotect(data, need, PROT_READ | PROT_WRITE) != 0) {
    const std::lock_guard lock(mutex_);
    ranges_.free(*offset);
    fail(Status::out_of_memory, "host memory", std::to_string(need) + " bytes", "none");
  }
  // Kernels and copies stream through whole layers; fewer TLB misses. Only a hint.
  if (need >= kHugePage) madvise(data, need, MADV_HUGEPAGE);
  return data;
}

void HostRegion::deallocate(std::byte* data, std::size_t bytes) noexcept {
  if (data == nullptr) return;
  const std::size_t size = rounded_up(bytes, page_bytes());
  const off_t offset = data - base_;
  if (file_ >= 0) {
    fallocate(file_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, static_cast<off_t>(size));
  }
  // A new reservation in its place gives back the pages and the right to them. It can fail when the
  // process has too many mappings; then the pages at least go back, and read as zero afterwards.
  if (mmap(data, size, PROT_NONE, reserve_flags(file_) | MAP_FIXED, file_,
           file_ < 0 ? 0 : offset) == MAP_FAILED) {
    madvise(data, size, MADV_DONTNEED);
  }
  const std::lock_guard lock(mutex_);
  ranges_.free(data - base_);
}

}  // namespace toppings
