// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd_avx512.h"
// after Simd:
#include "cpu/table.h"

// vdpbf16ps: sum[i] += x[2i] w[2i] + x[2i + 1] w[2i + 1], for bf16 x and bf16 weights. AMD Zen 4
// (2022), Intel Cooper Lake (2020), Sapphire Rapids (2023) and later.
namespace toppings::cpu {
namespace {

// Two bf16 numbers. The units of expand are two rank rows of one column; a step's first vector
// holds the even ones of 32 columns, its second the odd ones, which is how y is taken apart by
// shifts alone.
struct UnitBf16 {
  static constexpr int kElements = 2;

  TOPPINGS_INLINE static F mul_add(F x, F w, F sum) {
    return _mm512_dpbf16_ps(sum, __builtin_bit_cast(__m512bh, x), __builtin_bit_cast(__m512bh, w));
  }

  TOPPINGS_INLINE static F load(const bf16* p) { return _mm512_castsi512_ps(load_32(p)); }
  TOPPINGS_INLINE static F load(const bf16* p, int n) { return _mm512_castsi512_ps(load_32(p, n)); }

  TOPPINGS_INLINE static void load_rows(const bf16* b, std::int64_t stride, F (&rows)[2]) {
    pair(load_32(b), load_32(b + stride), rows);
  }
  TOPPINGS_INLINE static void load_rows(const bf16* b, std::int64_t stride, F (&rows)[2], int n) {
    pair(load_32(b, n), load_32(b + stride, n), rows);
  }
  TOPPINGS_INLINE static void load_last_row(const bf16* b, F (&rows)[2]) {
    pair(load_32(b), _mm512_setzero_si512(), rows);
  }
  TOPPINGS_INLINE static void load_last_row(const bf16* b, F (&rows)[2], int n) {
    pair(load_32(b, n), _mm512_setzero_si512(), rows);
  }

  TOPPINGS_INLINE static void add_to(bf16* y, F (&sum)[2]) {
    add(load_32(y), sum);
    _mm512_storeu_si512(y, rounded(sum));
  }
  TOPPINGS_INLINE static void add_to(bf16* y, F (&sum)[2], int n) {
    add(load_32(y, n), sum);
    _mm512_mask_storeu_epi16(y, mask_32(n), rounded(sum));
  }

  static void scale_v(const float* v, std::int64_t ranks, float scale, float* units) {
    auto* out = reinterpret_cast<bf16*>(units);
    std::int64_t j = 0;
    const F scales = Simd::broadcast(scale);
    for (; j + Simd::kWidth <= ranks; j += Simd::kWidth) {
      Simd::store(out + j, Simd::mul(scales, Simd::load(v + j)));
    }
    if (j < ranks) {
      const int n = static_cast<int>(ranks - j);
      // An odd rank's last unit is filled up with a zero.
      const F scaled = _mm512_maskz_mul_ps(Simd::mask(n), scales, Simd::load(v + j, n));
      Simd::store(out + j, scaled, (n + 1) / 2 * 2);
    }
  }

 private:
  TOPPINGS_INLINE static __mmask32 mask_32(int n) {
    return static_cast<__mmask32>((1ull << n) - 1ull);
  }
  TOPPINGS_INLINE static __m512i load_32(const bf16* p) { return _mm512_loadu_si512(p); }
  TOPPINGS_INLINE static __m512i load_32(const bf16* p, int n) {
    return _mm512_maskz_loadu_epi16(mask_32(n), p);
  }

  TOPPINGS_INLINE static __m512i high_halves() {
    return _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  }

  TOPPINGS_INLINE static void pair(__m512i row, __m512i next, F (&rows)[2]) {
    // Selects by the third operand: its high halves, else the other's low ones.
    constexpr int kSelect = 0xca;
    const __m512i even =
        _mm512_ternarylogic_epi32(high_halves(), _mm512_slli_epi32(next, 16), row, kSelect);
    const __m512i odd =
        _mm512_ternarylogic_epi32(high_halves(), next, _mm512_srli_epi32(row, 16), kSelect);
    rows[0] = _mm512_castsi512_ps(even);
    rows[1] = _mm512_castsi512_ps(odd);
  }

  TOPPINGS_INLINE static void add(__m512i y, F (&sum)[2]) {
    sum[0] = _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), sum[0]);
    sum[1] = _mm512_add_ps(_mm512_castsi512_ps(_mm512_and_si512(y, high_halves())), sum[1]);
  }

  // To nearest even; subnormal results become zero, as those of the multiply-add do.
  TOPPINGS_INLINE static __m512i rounded(const F (&sum)[2]) {
    const __m512i both = __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(sum[1], sum[0]));
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both);
  }
};

constexpr Kernels bf16_kernels() {
  Kernels kernels = fp32_kernels();
  kernels.shrink[2][2] = shrink<UnitBf16, bf16, bf16>;
  kernels.expand_bf16 = expand<UnitBf16, bf16, bf16>;
  return kernels;
}

}  // namespace

constinit const Kernels kAvx512Bf16Kernels = bf16_kernels();

}  // namespace toppings::cpu
