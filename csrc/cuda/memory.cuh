// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/params.h"
#include "cuda/ptx.cuh"

// Rows in global memory of any dtype, alignment and length, and their tiles in shared memory.
namespace toppings::cuda {

template <class Math>
inline constexpr int kChunkNumbers = 16 / sizeof(Math);

template <class Math>
inline constexpr DType kDType = DType::f32;
template <>
inline constexpr DType kDType<f16> = DType::f16;
template <>
inline constexpr DType kDType<bf16> = DType::bf16;

// The 16-byte chunk of a tile's row. Rows are multiples of 128 bytes; chunks are permuted by the
// row's number, its three low bits reversed, so that neither a column of 16 bytes, nor two rows of
// half a line, nor four of a pair of chunks meet in a bank.
TOPPINGS_DEVICE std::byte* chunk_at(std::byte* tile, int row_bytes, int row, int chunk) {
  const int mix = (row & 1) << 2 | (row & 2) | (row & 4) >> 2;
  return tile + row * row_bytes + (chunk ^ mix) * 16;
}
TOPPINGS_DEVICE const std::byte* chunk_at(const std::byte* tile, int row_bytes, int row,
                                          int chunk) {
  return chunk_at(const_cast<std::byte*>(tile), row_bytes, row, chunk);
}

TOPPINGS_DEVICE const std::byte* element(const void* base, DType dtype, std::int64_t index) {
  return static_cast<const std::byte*>(base) + index * (dtype == DType::f32 ? 4 : 2);
}

TOPPINGS_DEVICE bool is_aligned(const void* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

TOPPINGS_DEVICE float load_as_float(const void* base, DType dtype, std::int64_t index) {
  const std::byte* address = element(base, dtype, index);
  if (dtype == DType::f32) return load_global_coherent<float>(address);
  const auto bits = load_global_coherent<std::uint16_t>(address);
  return dtype == DType::f16 ? to_float(f16{bits}) : to_float(bf16{bits});
}

// A chunk of numbers [begin, end) of a row: zeros beyond the end. Copied asynchronously where the
// row is as the tile wants it, else number by number. A kernel of 16-bit Math knows every dtype:
// Math's.
template <class Math>
TOPPINGS_DEVICE void load_chunk(std::byte* to, const void* row, DType dtype, std::int32_t begin,
                                std::int32_t end) {
  constexpr int kNumbers = kChunkNumbers<Math>;
  if constexpr (sizeof(Math) == 2) dtype = kDType<Math>;
  const std::int32_t left = end - begin;
  const int valid = left < 0 ? 0 : left < kNumbers ? left : kNumbers;
  const std::byte* from = element(row, dtype, begin);
  if (dtype == kDType<Math> && is_aligned(from)) {
    copy_async<16>(to, valid > 0 ? from : static_cast<const std::byte*>(row),
                   valid * static_cast<int>(sizeof(Math)));
    return;
  }
  Vec16 chunk;
  TOPPINGS_CUDA_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(Math) == 2) {
      const std::uint32_t low =
          2 * i < valid ? load_global_coherent<std::uint16_t>(from + 4 * i) : std::uint16_t{0};
      const std::uint32_t high = 2 * i + 1 < valid
                                     ? load_global_coherent<std::uint16_t>(from + 4 * i + 2)
                                     : std::uint16_t{0};
      chunk.w[i] = low | high << 16;
    } else {
      chunk.w[i] = bit_cast<std::uint32_t>(i < valid ? load_as_float(from, dtype, i) : 0.0f);
    }
  }
  store_shared(to, chunk);
}

// The way back, rounded to the row's dtype.
template <class Math>
TOPPINGS_DEVICE void store_chunk(const std::byte* chunk, void* row, DType dtype, std::int32_t begin,
                                 std::int32_t end) {
  constexpr int kNumbers = kChunkNumbers<Math>;
  if constexpr (sizeof(Math) == 2) dtype = kDType<Math>;
  const std::int32_t left = end - begin;
  const int valid = left < 0 ? 0 : left < kNumbers ? left : kNumbers;
  if (valid == 0) return;
  auto* to = const_cast<std::byte*>(element(row, dtype, begin));
  const auto numbers = load_shared<Vec16>(chunk);
  if (valid == kNumbers && dtype == kDType<Math> && is_aligned(to)) {
    store_global(to, numbers);
    return;
  }
  TOPPINGS_CUDA_UNROLL
  for (int i = 0; i < kNumbers; ++i) {
    if (i >= valid) break;
    if constexpr (sizeof(Math) == 2) {
      store_global(to + 2 * i, static_cast<std::uint16_t>(numbers.w[i / 2] >> (i % 2 * 16)));
    } else {
      const float value = bit_cast<float>(numbers.w[i]);
      if (dtype == DType::f32) {
        store_global(to + 4 * i, value);
      } else if (dtype == DType::f16) {
        store_global(to + 2 * i, from_float<f16>(value));
      } else {
        store_global(to + 2 * i, from_float<bf16>(value));
      }
    }
  }
}

}  // namespace toppings::cuda
