// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/ptx_base.cuh"

#ifndef __CUDACC__
#include <cmath>

#include "cpu/convert.h"
#endif

// Number formats. Every conversion rounds to nearest even, on both sides alike (but for the payload
// of a NaN).
namespace toppings::cuda {

struct f16 {
  std::uint16_t bits;
};
struct bf16 {
  std::uint16_t bits;
};
struct Float2 {
  float x, y;
};

TOPPINGS_DEVICE float to_float(float value) { return value; }

TOPPINGS_DEVICE float to_float(bf16 value) {
  return bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16);
}

TOPPINGS_DEVICE float to_float(f16 value) {
#ifdef __CUDACC__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return cpu::to_float(cpu::f16{value.bits});
#endif
}

namespace detail {

TOPPINGS_DEVICE void round_to(float value, float& out) { out = value; }

TOPPINGS_DEVICE void round_to(float value, bf16& out) {
#ifdef __CUDACC__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  cpu::bf16 rounded;
  cpu::from_float(value, rounded);
  out.bits = rounded.bits;
#endif
}

TOPPINGS_DEVICE void round_to(float value, f16& out) {
#ifdef __CUDACC__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(value));
#else
  cpu::f16 rounded;
  cpu::from_float(value, rounded);
  out.bits = rounded.bits;
#endif
}

template <class T>
inline constexpr bool kIsBf16 = false;
template <>
inline constexpr bool kIsBf16<bf16> = true;

}  // namespace detail

// T is float, bf16 or f16.
template <class T>
TOPPINGS_DEVICE T from_float(float value) {
  T result;
  detail::round_to(value, result);
  return result;
}

// Two numbers of 16 bits in a word, x in the lower half, as mma and vector loads have them.
template <class T>
TOPPINGS_DEVICE std::uint32_t pack2(float x, float y) {
  static_assert(sizeof(T) == 2);
#ifdef __CUDACC__
  std::uint32_t result;
  if constexpr (detail::kIsBf16<T>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(y), "f"(x));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(y), "f"(x));
  }
  return result;
#else
  return from_float<T>(x).bits | static_cast<std::uint32_t>(from_float<T>(y).bits) << 16;
#endif
}

template <class T>
TOPPINGS_DEVICE Float2 unpack2(std::uint32_t word) {
  static_assert(sizeof(T) == 2);
  if constexpr (detail::kIsBf16<T>) {
    return {bit_cast<float>(word << 16), bit_cast<float>(word & 0xffff0000u)};
  } else {
    return {to_float(T{static_cast<std::uint16_t>(word)}),
            to_float(T{static_cast<std::uint16_t>(word >> 16)})};
  }
}

// a * b + c, rounded once.
TOPPINGS_DEVICE float multiply_add(float a, float b, float c) {
#ifdef __CUDACC__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

}  // namespace toppings::cuda
