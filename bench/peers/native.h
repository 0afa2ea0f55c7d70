// SPDX-License-Identifier: Apache-2.0
// The interface of the peers in C++, for native.py: all calls of a case are prepared at once,
// weights packed as the library likes them and multiplied by the adapter's scale.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>
#include <vector>

extern "C" {

// The tokens of one adapter. x [tokens, K], y [tokens, N], a [r, K], b [r, N].
struct Part {
  std::int64_t tokens;
  std::int64_t rank;
  const void* x;
  void* y;
  const void* a;
  const void* b;
  double scale;
};

struct Problem {
  std::int64_t bf16;  // else float32
  std::int64_t width_in;
  std::int64_t width_out;
  std::int64_t calls;
  std::int64_t parts;  // of each call
};

const char* toppings_peer_version();
// parts: those of call 0, then of call 1, and so on. Null with a message in toppings_peer_error().
void* toppings_peer_prepare(const Problem* problem, const Part* parts);
const char* toppings_peer_error();
void toppings_peer_run(void* prepared, std::int64_t call);
void toppings_peer_free(void* prepared);

}  // extern "C"

namespace peers {

// Memory in huge pages, 64-byte aligned, given back all at once.
class HugeMemory {
 public:
  HugeMemory() = default;
  HugeMemory(const HugeMemory&) = delete;
  HugeMemory& operator=(const HugeMemory&) = delete;
  ~HugeMemory() {
    for (const auto& [data, bytes] : chunks_) munmap(data, bytes);
  }

  void* allocate(std::size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    if (used_ + bytes > size_) grow(bytes);
    void* result = static_cast<char*>(chunks_.back().first) + used_;
    used_ += bytes;
    return result;
  }

 private:
  void grow(std::size_t bytes) {
    constexpr std::size_t kChunk = std::size_t{64} << 20;
    size_ = (bytes + kChunk - 1) / kChunk * kChunk;
    void* data = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    madvise(data, size_, MADV_HUGEPAGE);
    chunks_.emplace_back(data, size_);
    used_ = 0;
  }

  std::vector<std::pair<void*, std::size_t>> chunks_;
  std::size_t size_ = 0;
  std::size_t used_ = 0;
};

inline float bf16_to_float(std::uint16_t bits) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(bits) << 16);
}

inline std::uint16_t float_to_bf16(float value) {  // to nearest even; weights are finite
  const auto bits = __builtin_bit_cast(std::uint32_t, value);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// values * scale, count of them.
inline void scale_bf16(const void* values, float scale, std::int64_t count, void* out) {
  const auto* in = static_cast<const std::uint16_t*>(values);
  for (std::int64_t i = 0; i < count; ++i) {
    static_cast<std::uint16_t*>(out)[i] = float_to_bf16(bf16_to_float(in[i]) * scale);
  }
}

inline void scale_float(const void* values, float scale, std::int64_t count, void* out) {
  const auto* in = static_cast<const float*>(values);
  for (std::int64_t i = 0; i < count; ++i) static_cast<float*>(out)[i] = in[i] * scale;
}

}  // namespace peers
