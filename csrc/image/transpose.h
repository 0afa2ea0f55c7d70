// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace toppings {

inline constexpr std::size_t kTransposeTile = 8;

// An 8 x 8 tile of 16-bit elements: dst[c][r] = src[r][c].
inline void transpose_tile(std::uint16_t* dst, std::size_t dst_stride, const std::uint16_t* src,
                           std::size_t src_stride) {
#ifdef __SSE2__
  // Interleaving rows i and i + 4 moves one bit of the row number into the column number; three
  // rounds exchange them. Rows of B are short (the rank), so that a plain loop would spend a load
  // and a store on every element.
  __m128i x[8];
  __m128i y[8];
  const auto interleave = [](__m128i* to, const __m128i* from) {
    for (std::size_t i = 0; i < 4; ++i) {
      to[2 * i] = _mm_unpacklo_epi16(from[i], from[i + 4]);
      to[2 * i + 1] = _mm_unpackhi_epi16(from[i], from[i + 4]);
    }
  };
  for (std::size_t i = 0; i < 8; ++i) {
    x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i * src_stride));
  }
  interleave(y, x);
  interleave(x, y);
  interleave(y, x);
  for (std::size_t i = 0; i < 8; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i * dst_stride), y[i]);
  }
#else
  for (std::size_t c = 0; c < kTransposeTile; ++c) {
    for (std::size_t r = 0; r < kTransposeTile; ++r) {
      dst[c * dst_stride + r] = src[r * src_stride + c];
    }
  }
#endif
}

// dst[c][r] = src[r][c] for a contiguous src [rows, cols]; dst [cols, rows] has dst_stride elements
// from row to row. src should fit into the L1 cache: the caller goes through a matrix in panels.
template <class T>
void transpose_panel(T* dst, std::size_t dst_stride, const T* src, std::size_t rows,
                     std::size_t cols) {
  std::size_t tiled_rows = 0;
  std::size_t tiled_cols = 0;
  if constexpr (sizeof(T) == sizeof(std::uint16_t)) {
    tiled_rows = rows / kTransposeTile * kTransposeTile;
    tiled_cols = cols / kTransposeTile * kTransposeTile;
  }
  for (std::size_t c = 0; c < tiled_cols; c += kTransposeTile) {
    for (std::size_t r = 0; r < tiled_rows; r += kTransposeTile) {
      if constexpr (sizeof(T) == sizeof(std::uint16_t)) {
        transpose_tile(dst + c * dst_stride + r, dst_stride, src + r * cols + c, cols);
      }
    }
  }
  for (std::size_t c = 0; c < cols; ++c) {
    for (std::size_t r = c < tiled_cols ? tiled_rows : 0; r < rows; ++r) {
      dst[c * dst_stride + r] = src[r * cols + c];
    }
  }
}

}  // namespace toppings
