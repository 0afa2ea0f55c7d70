// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/unroll.h"

// A unit is 32 bits that one lane multiplies at once: one fp32 number here, two bf16 numbers in
// avx512_bf16.cpp, neighbours along the direction that is summed over. Everything is in an unnamed
// namespace: see kernels.h. `Simd` must be defined before.
namespace toppings::cpu {
namespace {

using F = Simd::F;

// Columns that expand takes together: two vectors of sums.
inline constexpr int kGroupColumns = 2 * Simd::kWidth;

// Whatever the dtypes, operands are converted to fp32.
struct UnitF32 {
  static constexpr int kElements = 1;

  TOPPINGS_INLINE static F mul_add(F x, F w, F sum) { return Simd::mul_add(x, w, sum); }

  // kWidth units along K.
  template <class T>
  TOPPINGS_INLINE static F load(const T* p) {
    return Simd::load(p);
  }
  template <class T>
  TOPPINGS_INLINE static F load(const T* p, int n) {
    return Simd::load(p, n);
  }

  // A step of expand: kElements rank rows by kGroupColumns columns, of which the first n exist.
  template <class W>
  TOPPINGS_INLINE static void load_rows(const W* b, std::int64_t, F (&rows)[2]) {
    rows[0] = Simd::load(b);
    rows[1] = Simd::load(b + Simd::kWidth);
  }
  template <class W>
  TOPPINGS_INLINE static void load_rows(const W* b, std::int64_t, F (&rows)[2], int n) {
    rows[0] = Simd::load(b, n < Simd::kWidth ? n : Simd::kWidth);
    rows[1] = n > Simd::kWidth ? Simd::load(b + Simd::kWidth, n - Simd::kWidth) : Simd::zero();
  }

  // y += sum, rounded once.
  template <class Y>
  TOPPINGS_INLINE static void add_to(Y* y, F (&sum)[2]) {
    Simd::store(y, Simd::add(Simd::load(y), sum[0]));
    Simd::store(y + Simd::kWidth, Simd::add(Simd::load(y + Simd::kWidth), sum[1]));
  }
  template <class Y>
  TOPPINGS_INLINE static void add_to(Y* y, F (&sum)[2], int n) {
    const int first = n < Simd::kWidth ? n : Simd::kWidth;
    Simd::store(y, Simd::add(Simd::load(y, first), sum[0]), first);
    if (n <= Simd::kWidth) return;
    y += Simd::kWidth;
    n -= Simd::kWidth;
    Simd::store(y, Simd::add(Simd::load(y, n), sum[1]), n);
  }

  // units[j] = scale * v[j]
  static void scale_v(const float* v, std::int64_t ranks, float scale, float* units) {
    const F scales = Simd::broadcast(scale);
    std::int64_t j = 0;
    for (; j + Simd::kWidth <= ranks; j += Simd::kWidth) {
      Simd::store(units + j, Simd::mul(scales, Simd::load(v + j)));
    }
    if (j < ranks) {
      const int n = static_cast<int>(ranks - j);
      Simd::store(units + j, Simd::mul(scales, Simd::load(v + j, n)), n);
    }
  }
};

}  // namespace
}  // namespace toppings::cpu
