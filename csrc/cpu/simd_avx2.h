// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/convert.h"
#include "cpu/unroll.h"

namespace toppings::cpu {
namespace {

// AVX2, FMA and F16C: Intel Haswell (2013), AMD Zen (2017) and later.
struct Simd {
  using F = __m256;
  static constexpr int kWidth = 8;
  // Tiles whose sums take 8 of the 16 registers, as many as FMA's latency asks.
  static constexpr int kShrinkTokens = 2;  // with 4 rank rows
  static constexpr int kStreamSums = 8;
  static constexpr int kPanelTokens = 4;
  static constexpr int kPanelGroups = 1;  // of kGroupColumns

  static F zero() { return _mm256_setzero_ps(); }
  static F broadcast(float value) { return _mm256_set1_ps(value); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F mul_add(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  // total[i] = the sum of f[i]'s lanes.
  template <int N>
  TOPPINGS_INLINE static void sums(const F (&f)[N], float (&total)[N]) {
    TOPPINGS_UNROLL for (int i = 0; i < N; ++i) {
      __m128 s = _mm_add_ps(_mm256_castps256_ps128(f[i]), _mm256_extractf128_ps(f[i], 1));
      s = _mm_add_ps(s, _mm_movehl_ps(s, s));
      total[i] = _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
  }

  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static F load(const f16* p) { return _mm256_cvtph_ps(load_16(p)); }
  static F load(const bf16* p) { return widen(load_16(p)); }

  // No masked access for 16-bit elements here: the tail passes through a padded buffer.
  static F load(const float* p, int n) { return _mm256_maskload_ps(p, mask(n)); }
  static F load(const f16* p, int n) { return _mm256_cvtph_ps(load_16(p, n)); }
  static F load(const bf16* p, int n) { return widen(load_16(p, n)); }

  static void store(float* p, F f) { _mm256_storeu_ps(p, f); }
  static void store(f16* p, F f) { store_16(p, _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT)); }
  static void store(bf16* p, F f) { store_16(p, narrow(f)); }

  static void store(float* p, F f, int n) { _mm256_maskstore_ps(p, mask(n), f); }
  static void store(f16* p, F f, int n) {
    store_16(p, _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT), n);
  }
  static void store(bf16* p, F f, int n) { store_16(p, narrow(f), n); }

 private:
  static __m256i mask(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }

  static __m128i load_16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
  static void store_16(void* p, __m128i v) { _mm_storeu_si128(static_cast<__m128i*>(p), v); }

  template <class T>
  static __m128i load_16(const T* p, int n) {
    alignas(16) std::uint16_t buffer[kWidth] = {};
    for (int i = 0; i < n; ++i) buffer[i] = p[i].bits;
    return load_16(buffer);
  }

  template <class T>
  static void store_16(T* p, __m128i v, int n) {
    alignas(16) std::uint16_t buffer[kWidth];
    store_16(buffer, v);
    for (int i = 0; i < n; ++i) p[i].bits = buffer[i];
  }

  static F widen(__m128i v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
  }

  static __m128i narrow(F f) {  // to nearest even
    const __m256i bits = _mm256_castps_si256(f);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i bias =
        _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
    const __m256i chosen = _mm256_blendv_epi8(rounded, nan, is_nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
  }
};

}  // namespace
}  // namespace toppings::cpu
