// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/dtype.h>
#include <toppings/export.h>
#include <toppings/image.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

// What an engine asks of CPU workers: the deltas of one adapter at one site, for some tokens.
namespace toppings::assist {

inline constexpr int kMaxProjections = 8;

// Memory that weights lie in. Engine and workers may have mapped it at different addresses; both
// number their regions alike.
struct Region {
  const std::byte* base;
  std::int64_t bytes;
};

// For workers in the engine's own process: an offset is an address then.
inline constexpr Region kWholeAddressSpace{nullptr, INT64_MAX};

// One projection of the site. Offsets are bytes from the region's base, multiples of the weights'
// size.
struct TaskProjection {
  std::int64_t a_offset;  // A [rank, in]
  std::int64_t b_offset;  // B [rank, out], rank-major
  std::int32_t rank;      // 0: absent, its deltas are 0
  std::int32_t out;       // N
  float scale;
  std::int32_t reserved;  // 0
};

// deltas[t, s] = scale_s * (x[t] A_s^T) B_s in lora_forward's own arithmetic, as if added to 0.
// x [tokens, in] and deltas [tokens, sum of out] are contiguous. Plain data without addresses.
struct Task {
  std::int32_t tokens, in;
  std::int32_t region;           // index
  std::int32_t num_projections;  // S, of the array's first
  DType dtype;                   // of x and deltas
  DType weight_dtype;
  std::array<std::uint8_t, 6> reserved;  // 0
  std::array<TaskProjection, kMaxProjections> projections;

  std::int64_t columns() const noexcept {  // sum of out
    std::int64_t sum = 0;
    for (int s = 0; s < num_projections; ++s) sum += projections[static_cast<std::size_t>(s)].out;
    return sum;
  }
  std::int64_t x_bytes() const noexcept {
    return std::int64_t{tokens} * in * static_cast<std::int64_t>(size_of(dtype));
  }
  std::int64_t deltas_bytes() const noexcept {
    return tokens * columns() * static_cast<std::int64_t>(size_of(dtype));
  }
};
static_assert(std::is_trivially_copyable_v<Task> && sizeof(Task) == 24 + 32 * kMaxProjections);

// Projections [first, first + count) of a layer, which share their input, for `tokens` rows of x.
// Throws invalid_argument: no such projection, more than kMaxProjections, different inputs, an
// image outside of the region.
TOPPINGS_EXPORT Task make_task(const Image& image, int layer, int first, int count,
                               std::int64_t tokens, DType dtype, const Region& region,
                               int region_index);

}  // namespace toppings::assist
