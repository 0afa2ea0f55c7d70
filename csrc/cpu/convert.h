// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// Scalar conversions between fp32 and the 16-bit types, to nearest even. In an unnamed namespace
// because files compiled for different CPUs include it: the linker must not choose one copy for
// all.
namespace toppings::cpu {

// Storage of the 16-bit types.
struct f16 {
  std::uint16_t bits;
};
struct bf16 {
  std::uint16_t bits;
};

namespace {

inline std::uint32_t bits_of(float value) { return __builtin_bit_cast(std::uint32_t, value); }
inline float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) { return float_of(static_cast<std::uint32_t>(value.bits) << 16); }

inline float to_float(f16 value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t rest = value.bits & 0x7fffu;
  // Subnormals go through an integer, so that a thread that flushes fp32 subnormals gets the same
  // result.
  const std::uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<std::int32_t>(rest)) * 0x1p-24f);
  const std::uint32_t normal = (rest << 13) + (112u << 23);
  const std::uint32_t special = (rest << 13) | 0x7f800000u;
  return float_of(sign | (rest < 0x0400u ? subnormal : rest < 0x7c00u ? normal : special));
}

inline void from_float(float value, float& out) { out = value; }

inline void from_float(float value, bf16& out) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const std::uint32_t nan = (bits >> 16) | 0x40u;
  out.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline void from_float(float value, f16& out) {
  const std::uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const std::uint32_t bits = bits_of(value) & 0x7fffffffu;
  // Adding 0.5, whose last place is fp16's smallest subnormal, rounds to a multiple of it.
  const std::uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - bits_of(0.5f);
  const std::uint32_t normal = (bits - (112u << 23) + 0x0fffu + ((bits >> 13) & 1u)) >> 13;
  const std::uint32_t nan = 0x7e00u | ((bits >> 13) & 0x01ffu);
  const std::uint32_t rest = bits > 0x7f800000u    ? nan
                             : bits >= 0x477ff000u ? 0x7c00u
                             : bits < 0x38800000u  ? subnormal
                                                   : normal;
  out.bits = static_cast<std::uint16_t>(sign | rest);
}

}  // namespace
}  // namespace toppings::cpu
