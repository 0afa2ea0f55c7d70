// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/convert.h"
#include "cpu/unroll.h"

namespace toppings::cpu {
namespace {

// AVX-512 F, BW, VL and DQ: Intel Skylake-SP (2017), AMD Zen 4 (2022) and later.
struct Simd {
  using F = __m512;
  static constexpr int kWidth = 16;
  // Tiles whose sums take half of the 32 registers, more than the latency of a multiply-add asks.
  static constexpr int kShrinkTokens = 4;  // with 4 rank rows
  static constexpr int kStreamSums = 8;    // memory is the limit: small tiles, even prefetching
  static constexpr int kPanelTokens = 4;
  static constexpr int kPanelGroups = 2;  // of kGroupColumns

  static F zero() { return _mm512_setzero_ps(); }
  static F broadcast(float value) { return _mm512_set1_ps(value); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  // total[i] = the sum of f[i]'s lanes; for every N in the same order.
  template <int N>
  TOPPINGS_INLINE static void sums(const F (&f)[N], float (&total)[N]) {
    if constexpr (N == 16) {
      F s[8];
      TOPPINGS_UNROLL for (int i = 0; i < 8; ++i) s[i] = add_halves(f[2 * i], f[2 * i + 1]);
      const F q = add_quarters(add_pairs(add_lanes(s[0], s[1]), add_lanes(s[2], s[3])),
                               add_pairs(add_lanes(s[4], s[5]), add_lanes(s[6], s[7])));
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      _mm512_storeu_ps(total, _mm512_permutexvar_ps(order, q));
    } else if constexpr (N == 8) {
      F s[4];
      TOPPINGS_UNROLL for (int i = 0; i < 4; ++i) s[i] = add_halves(f[2 * i], f[2 * i + 1]);
      const F p = add_pairs(add_lanes(s[0], s[1]), add_lanes(s[2], s[3]));
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
      _mm256_storeu_ps(total,
                       _mm512_castps512_ps256(_mm512_permutexvar_ps(order, add_quarters(p, p))));
    } else {
      TOPPINGS_UNROLL for (int i = 0; i < N; ++i) {
        F s = add_halves(f[i], f[i]);
        s = add_lanes(s, s);
        s = add_pairs(s, s);
        total[i] = _mm512_cvtss_f32(add_quarters(s, s));
      }
    }
  }

  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static F load(const f16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load(const bf16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static F load(const float* p, int n) { return _mm512_maskz_loadu_ps(mask(n), p); }
  static F load(const f16* p, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), p));
  }
  static F load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(mask(n), p)); }

  static void store(float* p, F f) { _mm512_storeu_ps(p, f); }
  static void store(f16* p, F f) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_f16(f));
  }
  static void store(bf16* p, F f) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(f));
  }

  static void store(float* p, F f, int n) { _mm512_mask_storeu_ps(p, mask(n), f); }
  static void store(f16* p, F f, int n) { _mm256_mask_storeu_epi16(p, mask(n), narrow_f16(f)); }
  static void store(bf16* p, F f, int n) { _mm256_mask_storeu_epi16(p, mask(n), narrow_bf16(f)); }

  // Rounded to bf16, to nearest even, in the low halves. Not vcvtneps2bf16, which flushes
  // subnormals.
  static __m512i rounded_bf16(F f) {
    const __m512i bits = _mm512_castps_si512(f);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i bias =
        _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
  }

  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

 private:
  // The steps of sums: every sum's 16 lanes become 8, 4, 2, 1.
  TOPPINGS_INLINE static F add_halves(F a, F b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  TOPPINGS_INLINE static F add_lanes(F a, F b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
  TOPPINGS_INLINE static F add_pairs(F a, F b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  TOPPINGS_INLINE static F add_quarters(F a, F b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  }

  static F widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }

  static __m256i narrow_f16(F f) { return _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT); }

  static __m256i narrow_bf16(F f) { return _mm512_cvtepi32_epi16(rounded_bf16(f)); }
};

}  // namespace
}  // namespace toppings::cpu
