// SPDX-License-Identifier: Apache-2.0
#include <sys/mman.h>
#include <toppings/device.h>
#include <toppings/error.h>

#include <cstddef>
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

class HostDevice final : public Device {
 public:
  std::string_view name() const noexcept override { return "host"; }

  void* allocate(std::size_t bytes) override {
    if (bytes == 0) fail(Status::invalid_argument, "bytes", "at least 1", "0");
    void* data = bytes < kMapFrom ? allocate_small(bytes) : map(bytes);
    if (data == nullptr) {
      fail(Status::out_of_memory, "host memory", std::to_string(bytes) + " bytes", "none");
    }
    return data;
  }

  void deallocate(void* data, std::size_t bytes) noexcept override {
    if (data == nullptr) return;
    if (bytes < kMapFrom) {
      ::operator delete(data, std::align_val_t{kAlignment});
    } else {
      munmap(data, bytes);
    }
  }

  void* allocate_host(std::size_t bytes) override { return allocate(bytes); }
  void deallocate_host(void* data, std::size_t bytes) noexcept override { deallocate(data, bytes); }

  void copy(void* device_dst, const void* host_src, std::size_t bytes) override {
    std::memcpy(device_dst, host_src, bytes);
  }

 private:
  static void* allocate_small(std::size_t bytes) {
    void* data = ::operator new(bytes, std::align_val_t{kAlignment}, std::nothrow);
    if (data != nullptr) std::memset(data, 0, bytes);
    return data;
  }

  static void* map(std::size_t bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) return nullptr;
    // Kernels and copies stream through whole layers; fewer TLB misses. Only a hint.
    madvise(data, bytes, MADV_HUGEPAGE);
    return data;
  }
};

}  // namespace

std::shared_ptr<Device> host_device() {
  static const auto device = std::make_shared<HostDevice>();
  return device;
}

}  // namespace toppings
