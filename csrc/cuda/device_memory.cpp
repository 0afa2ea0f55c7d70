// SPDX-License-Identifier: Apache-2.0
#include "cuda/device_memory.h"

#include <cuda_runtime_api.h>
#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <climits>
#include <cstdint>
#include <fstream>
#include <string>

#include "check.h"
#include "cuda/device_call.h"

namespace toppings::cuda {
namespace {

constexpr std::size_t kPage = 4096, kHugePage = std::size_t{2} << 20;
constexpr std::size_t kNodes = 1024;
constexpr std::size_t kWordBits = sizeof(unsigned long) * CHAR_BIT;

std::size_t mapped_bytes(std::size_t bytes) {
  const std::size_t page = bytes < kHugePage ? kPage : kHugePage;
  return (bytes + page - 1) / page * page;
}

// bytes is a multiple of its page size, and the result is aligned to that, which large pages need.
void* map(std::size_t bytes) {
  const std::size_t spare = bytes < kHugePage ? 0 : kHugePage;
  void* data =
      mmap(nullptr, bytes + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) return nullptr;
  if (spare == 0) return data;
  auto* begin = static_cast<std::byte*>(data);
  const std::size_t past = reinterpret_cast<std::uintptr_t>(begin) % kHugePage;
  const std::size_t before = past == 0 ? 0 : kHugePage - past;
  if (before > 0) munmap(begin, before);
  if (before < spare) munmap(begin + before + bytes, spare - before);
  return begin + before;
}

// Where pages shall come from when they are touched. A wish: where the system can't (a container
// that forbids it, a full node), memory from elsewhere is slower and nothing else.
void prefer_node(void* data, std::size_t bytes, int node) {
  if (node < 0 || static_cast<std::size_t>(node) >= kNodes) return;
  std::array<unsigned long, kNodes / kWordBits> mask{};
  mask[static_cast<std::size_t>(node) / kWordBits] |= 1UL
                                                      << (static_cast<unsigned>(node) % kWordBits);
  syscall(SYS_mbind, data, bytes, MPOL_PREFERRED, mask.data(), kNodes, 0U);
}

}  // namespace

int numa_node_of(int index) {
  std::array<char, 32> id{};
  check_call(cudaDeviceGetPCIBusId(id.data(), static_cast<int>(id.size()), index),
             "cudaDeviceGetPCIBusId");
  std::string folder(id.data());
  std::transform(folder.begin(), folder.end(), folder.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  std::ifstream file("/sys/bus/pci/devices/" + folder + "/numa_node");
  int node = -1;
  return file >> node ? node : -1;
}

void* allocate_pinned(std::size_t bytes, int numa_node) {
  // Rounding up may not wrap around.
  void* data = bytes > SIZE_MAX / 2 ? nullptr : map(mapped_bytes(bytes));
  if (data == nullptr) {
    fail(Status::out_of_memory, "host memory", std::to_string(bytes) + " bytes", "none");
  }
  const std::size_t mapped = mapped_bytes(bytes);
  prefer_node(data, mapped, numa_node);
  if (mapped >= kHugePage) madvise(data, mapped, MADV_HUGEPAGE);
  // Touched before they are locked: the driver would take small pages one by one.
  auto* touched = static_cast<volatile std::byte*>(data);
  for (std::size_t at = 0; at < mapped; at += kPage) touched[at] = std::byte{0};
  try {
    check_call(cudaHostRegister(data, mapped, cudaHostRegisterPortable | cudaHostRegisterMapped),
               "cudaHostRegister");
  } catch (...) {
    munmap(data, mapped);
    throw;
  }
  return data;
}

void unmap(void* data, std::size_t bytes) noexcept { munmap(data, mapped_bytes(bytes)); }

}  // namespace toppings::cuda
