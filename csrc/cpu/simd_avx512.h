// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/convert.h"

namespace toppings::cpu {
namespace {

// AVX-512 F, BW, VL and DQ: Intel Skylake-SP (2017), AMD Zen 4 (2022) and later.
struct Simd {
  using F = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kShrinkTokens = 4;  // with 4 rank rows: 16 of 32 registers hold sums
  static constexpr int kExpandTokens = 4;
  static constexpr int kExpandGroups = 4;

  static F zero() { return _mm512_setzero_ps(); }
  static F broadcast(float value) { return _mm512_set1_ps(value); }
  static F mul_add(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  static float sum(F f) {
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(f), 1));
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(f), upper);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
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

 private:
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

  static F widen(__m256i v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
  }

  static __m256i narrow_f16(F f) { return _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT); }

  // To nearest even. Not vcvtneps2bf16, which flushes subnormals.
  static __m256i narrow_bf16(F f) {
    const __m512i bits = _mm512_castps_si512(f);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i bias =
        _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40)));
  }
};

}  // namespace
}  // namespace toppings::cpu
