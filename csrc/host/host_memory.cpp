// SPDX-License-Identifier: Apache-2.0
#include "host/host_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <new>
#include <string>

#include "check.h"

namespace toppings {
namespace {

constexpr std::size_t kAlignment = 64;

// From here on memory comes from mmap: its zeros cost nothing until a page is touched, and it goes
// back to the system at once when it is freed. Below, a page of granularity would be wasteful.
constexpr std::size_t kMapFrom = std::size_t{1} << 20;

void* allocate_small(std::size_t bytes) {
  void* data = ::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow);
  if (data != nullptr) std::memset(data, 0, bytes);
  return data;
}

void* map(std::size_t bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  // Kernels and copies stream through whole layers; fewer TLB misses. Only a hint.
  madvise(data, bytes, MADV_HUGEPAGE);
  return data;
}

}  // namespace

void* allocate_memory(std::size_t bytes) {
  if (bytes == 0) fail(Status::invalid_argument, "bytes", "at least 1", "0");
  void* data = bytes < kMapFrom ? allocate_small(bytes) : map(bytes);
  if (data == nullptr) {
    fail(Status::out_of_memory, "host memory", std::to_string(bytes) + " bytes", "none");
  }
  return data;
}

void deallocate_memory(void* data, std::size_t bytes) noexcept {
  if (data == nullptr) return;
  if (bytes < kMapFrom) {
    ::operator delete(data, std::align_val_t{kAlignment});
  } else {
    munmap(data, bytes);
  }
}

}  // namespace toppings
