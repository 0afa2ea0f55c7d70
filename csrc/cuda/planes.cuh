// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/plan.cuh"
#include "cuda/product.cuh"

// v on its way from planes in memory to lines in shared memory, as expand multiplies them.
namespace toppings::cuda {

// v[row, column .. column + 3] from planes [begin, end), which are whole parts.
template <int kAtOnce>
TOPPINGS_DEVICE void load_v(const Planes& v, std::int64_t row, int projection, int column, int rank,
                            int begin, int end, float (&sum)[4]) {
  const float* from = v.data + row * v.row_stride + projection * v.projection_stride + column;
  // In the workspace rows are padded and planes aligned; a v of the caller's need not be.
  const bool whole = is_aligned(from) && (column + 4 <= rank || !v.by_token);
  float part[4] = {};
  int in_part = 0;
  TOPPINGS_CUDA_UNROLL
  for (int j = 0; j < 4; ++j) sum[j] = 0;
  for (int first = begin; first < end; first += kAtOnce) {
    float planes[kAtOnce][4];
    TOPPINGS_CUDA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= end) continue;
      const float* plane = from + (first + i) * v.plane_stride;
      if (whole) {
        const auto four = load_global_coherent<Vec16>(plane);
        TOPPINGS_CUDA_UNROLL
        for (int j = 0; j < 4; ++j) planes[i][j] = bit_cast<float>(four.w[j]);
      } else {
        TOPPINGS_CUDA_UNROLL
        for (int j = 0; j < 4; ++j) {
          planes[i][j] = column + j < rank ? load_global_coherent<float>(plane + j) : 0.0f;
        }
      }
    }
    TOPPINGS_CUDA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= end) continue;
      const bool last = ++in_part == v.per_part || first + i == end - 1;
      if (last) in_part = 0;
      TOPPINGS_CUDA_UNROLL
      for (int j = 0; j < 4; ++j) {
        part[j] += planes[i][j];
        if (last) {
          sum[j] += part[j];
          part[j] = 0;
        }
      }
    }
  }
  // Beyond the rank the workspace holds whatever was there.
  TOPPINGS_CUDA_UNROLL
  for (int j = 0; j < 4; ++j) sum[j] = column + j < rank ? sum[j] : 0.0f;
}

// The exponent of two by which a row of fp16 terms is divided, so that its largest number is in
// [1, 2): the range of fp16 is too small for v as it comes.
TOPPINGS_DEVICE int exponent_of(float largest) {
  const int exponent = static_cast<int>(bit_cast<std::uint32_t>(largest) >> 23) - 127;
  return exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
}
TOPPINGS_DEVICE float power_of_two(int exponent) {
  return bit_cast<float>(static_cast<std::uint32_t>(exponent + 127) << 23);
}

// Writes rows of v into lines of shared memory. A row has 8 threads for each of kPartLanes groups,
// and a group sums parts of its own: with few tokens there are threads enough, and planes come in
// fewer rounds.
template <class Math, class Tile>
class LinesOfV {
 public:
  TOPPINGS_DEVICE LinesOfV(const Thread& thread, const LoraParams& p, const TokenTile& tile,
                           int projection, int rank, Scratch<Tile>& scratch)
      : thread_(thread),
        p_(p),
        tile_(tile),
        projection_(projection),
        rank_(rank),
        scratch_(scratch) {
    if constexpr (kIsScaled) {
      TOPPINGS_CUDA_ROLLED
      for (int row = first_row(); row < kEndRow; row += kRowsAtOnce) {
        float largest = 0;
        for (int first = 0; first < rank; first += kRankStep) {
          float v[4];
          load(row, first, v);
          for (const float value : v) {
            const float size = value < 0 ? -value : value;
            largest = size > largest ? size : largest;
          }
        }
        TOPPINGS_CUDA_UNROLL
        for (unsigned mask = 1; mask < 8; mask *= 2) {
          const float other = shuffle_xor(largest, mask);
          largest = other > largest ? other : largest;
        }
        if (thread_.index % kRowThreads == 0) scratch_.exponents[row] = exponent_of(largest);
      }
      sync_warp();
      thread_.index = static_cast<int>(opaque(static_cast<unsigned>(thread_.index)));
    }
  }

  // Numbers first .. first + kRankStep - 1.
  TOPPINGS_DEVICE void store(int first, std::byte* lines) const {
    const int eighth = thread_.index % 8;
    TOPPINGS_CUDA_ROLLED
    for (int row = first_row(); row < kEndRow; row += kRowsAtOnce) {
      float v[4];
      load(row, first, v);
      if (row >= tile_.count || thread_.index % kRowThreads >= 8) continue;
      if constexpr (sizeof(Math) == 4) {
        Vec16 four;
        TOPPINGS_CUDA_UNROLL
        for (int j = 0; j < 4; ++j) four.w[j] = bit_cast<std::uint32_t>(v[j]);
        store_shared(chunk_at(lines, kLineBytes, row, eighth), four);
      } else {
        const float inverse = kIsScaled ? power_of_two(-scratch_.exponents[row]) : 1.0f;
        Vec8 high, low;
        TOPPINGS_CUDA_UNROLL
        for (int j = 0; j < 2; ++j) {
          const float a = v[2 * j] * inverse, b = v[2 * j + 1] * inverse;
          high.w[j] = pack2<Math>(a, b);
          const Float2 rounded = unpack2<Math>(high.w[j]);
          low.w[j] = pack2<Math>(a - rounded.x, b - rounded.y);
        }
        store_shared(chunk_at(lines, kLineBytes, row, eighth / 2) + eighth % 2 * 8, high);
        store_shared(chunk_at(lines, kLineBytes, row, 4 + eighth / 2) + eighth % 2 * 8, low);
      }
    }
  }

  // What the products of a row are multiplied by.
  TOPPINGS_DEVICE float factor(int row) const {
    return kIsScaled ? power_of_two(scratch_.exponents[row]) : 1.0f;
  }

 private:
  static constexpr bool kIsScaled = kDType<Math> == DType::f16;
  static constexpr int kRowThreads = 8 * Tile::kPartLanes;
  static constexpr int kRowsAtOnce = kThreads<Tile> / kRowThreads;
  static constexpr int kEndRow = Tile::kTokens;

  TOPPINGS_DEVICE int first_row() const { return thread_.index / kRowThreads; }

  // Zeros beyond the tile's tokens. All lanes of the warp.
  TOPPINGS_DEVICE void load(int row, int first, float (&v)[4]) const {
    const int column = first + thread_.index % 8 * 4;
    TOPPINGS_CUDA_UNROLL
    for (int j = 0; j < 4; ++j) v[j] = 0;
    if (row < tile_.count && column < rank_) {
      const std::int64_t v_row =
          p_.v.by_token ? scratch_.tokens[row] : tile_.first - p_.window_begin + row;
      int begin = 0, end = p_.v.count;
      if constexpr (Tile::kPartLanes > 1) {
        begin = thread_.index % kRowThreads / 8 * p_.v.per_part;
        if (begin + p_.v.per_part < end) end = begin + p_.v.per_part;
      }
      load_v<Tile::kPlanesAtOnce>(p_.v, v_row, projection_, column, rank_, begin, end, v);
    }
    if constexpr (Tile::kPartLanes > 1) {
      static_assert(kRowThreads == 32);
      TOPPINGS_CUDA_UNROLL
      for (int j = 0; j < 4; ++j) {
        const unsigned eighth = static_cast<unsigned>(thread_.lane) % 8;
        float sum = shuffle(v[j], eighth);
        TOPPINGS_CUDA_UNROLL
        for (unsigned part = 1; part < Tile::kPartLanes; ++part) {
          sum += shuffle(v[j], 8 * part + eighth);
        }
        v[j] = sum;
      }
    }
  }

  Thread thread_;
  const LoraParams& p_;
  const TokenTile& tile_;
  int projection_, rank_;
  Scratch<Tile>& scratch_;
};

}  // namespace toppings::cuda
