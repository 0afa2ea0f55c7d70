// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd_avx512.h"
// after Simd:
#include "cpu/tile.h"

// vdpbf16ps: sum[i] += x[2i] w[2i] + x[2i + 1] w[2i + 1], for bf16 x and bf16 weights. AMD Zen 4
// (2022), Intel Cooper Lake (2020), Sapphire Rapids (2023) and later.
namespace toppings::cpu {
namespace {

TOPPINGS_INLINE __m512 dot_pairs(__m512i x, __m512i w, __m512 sum) {
  return _mm512_dpbf16_ps(sum, __builtin_bit_cast(__m512bh, x), __builtin_bit_cast(__m512bh, w));
}

TOPPINGS_INLINE __mmask32 mask_32(int n) { return static_cast<__mmask32>((1ull << n) - 1ull); }

struct DotBf16 {
  using X = bf16;
  using W = bf16;
  using Vector = __m512i;
  using Sum = __m512;
  static constexpr int kStep = 32;
  static constexpr int kTokens = Simd::kShrinkTokens;

  TOPPINGS_INLINE static Vector load(const bf16* p) { return _mm512_loadu_si512(p); }
  TOPPINGS_INLINE static Vector load(const bf16* p, int n) {
    return _mm512_maskz_loadu_epi16(mask_32(n), p);
  }
  TOPPINGS_INLINE static Sum mul_add(Vector x, Vector w, Sum sum) { return dot_pairs(x, w, sum); }
};

// Two rank rows at a time, 32 columns to a group. Interleaving the rows 16 bits by 16 within each
// 128-bit lane pairs them up; it leaves columns 0-3, 8-11, 16-19, 24-27 in one vector and the
// others in the second. The sums stay in that order and are put right once, before they meet y.
struct AxpyBf16 {
  using Y = bf16;
  using W = bf16;
  using V = bf16;
  struct Rows {
    __m512i even, odd;
  };
  struct Sum {
    __m512 even, odd;
  };
  static constexpr int kRows = 2;
  static constexpr int kColumns = 32;
  static constexpr int kTokens = 6;
  static constexpr int kGroups = 1;  // 12 sums in flight: what the instruction's latency asks for

  TOPPINGS_INLINE static Sum zero() { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
  TOPPINGS_INLINE static Rows load(const W* b, std::int64_t stride) {
    return interleave(_mm512_loadu_si512(b), _mm512_loadu_si512(b + stride));
  }
  TOPPINGS_INLINE static Rows load(const W* b, std::int64_t stride, int n) {
    return interleave(_mm512_maskz_loadu_epi16(mask_32(n), b),
                      _mm512_maskz_loadu_epi16(mask_32(n), b + stride));
  }
  TOPPINGS_INLINE static Rows load_last(const W* b) {
    return interleave(_mm512_loadu_si512(b), _mm512_setzero_si512());
  }
  TOPPINGS_INLINE static Rows load_last(const W* b, int n) {
    return interleave(_mm512_maskz_loadu_epi16(mask_32(n), b), _mm512_setzero_si512());
  }
  TOPPINGS_INLINE static Sum mul_add(const V* v, const Rows& rows, const Sum& sum) {
    int pair;
    __builtin_memcpy(&pair, v, sizeof(pair));
    const __m512i vs = _mm512_set1_epi32(pair);
    return {dot_pairs(vs, rows.even, sum.even), dot_pairs(vs, rows.odd, sum.odd)};
  }
  TOPPINGS_INLINE static void add_to(Y* y, float scale, const Sum& sum) {
    add_16(y, scale, first_16(sum));
    add_16(y + 16, scale, last_16(sum));
  }
  TOPPINGS_INLINE static void add_to(Y* y, float scale, const Sum& sum, int n) {
    if (n < 16) {
      add_16(y, scale, first_16(sum), n);
      return;
    }
    add_16(y, scale, first_16(sum));
    if (n > 16) add_16(y + 16, scale, last_16(sum), n - 16);
  }

 private:
  TOPPINGS_INLINE static Rows interleave(__m512i row, __m512i next) {
    return {_mm512_unpacklo_epi16(row, next), _mm512_unpackhi_epi16(row, next)};
  }
  TOPPINGS_INLINE static __m512 first_16(const Sum& sum) {
    const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    return _mm512_permutex2var_ps(sum.even, index, sum.odd);
  }
  TOPPINGS_INLINE static __m512 last_16(const Sum& sum) {
    const __m512i index =
        _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    return _mm512_permutex2var_ps(sum.even, index, sum.odd);
  }
  TOPPINGS_INLINE static void add_16(Y* y, float scale, __m512 sum) {
    const __m512 result = Simd::mul_add(Simd::broadcast(scale), sum, Simd::load(y));
    // vcvtneps2bf16 flushes subnormals and is right otherwise, at a sixth of the instructions.
    constexpr int kSubnormal = 0x20;
    if (__builtin_expect(_mm512_fpclass_ps_mask(result, kSubnormal) == 0, 1)) {
      const __m256bh rounded = _mm512_cvtneps_pbh(result);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), __builtin_bit_cast(__m256i, rounded));
    } else {
      Simd::store(y, result);
    }
  }
  TOPPINGS_INLINE static void add_16(Y* y, float scale, __m512 sum, int n) {
    Simd::store(y, Simd::mul_add(Simd::broadcast(scale), sum, Simd::load(y, n)), n);
  }
};

constexpr Kernels bf16_kernels() {
  Kernels kernels = fp32_kernels();
  kernels.shrink[2][2] = shrink<DotBf16>;
  kernels.expand_bf16 = expand<AxpyBf16>;
  return kernels;
}

}  // namespace

constinit const Kernels kAvx512Bf16Kernels = bf16_kernels();

}  // namespace toppings::cpu
