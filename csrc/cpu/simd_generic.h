// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "cpu/convert.h"

namespace toppings::cpu {
namespace {

// Four lanes in the compiler's own vector type: whatever the target's baseline has. This file's
// user is compiled with -ffp-contract=off, so that multiply and add stay two roundings on every
// target and in every tile.
struct Simd {
  using F = float __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static constexpr int kShrinkTokens = 2;  // with 4 rank rows: 8 of 16 registers
  static constexpr int kExpandTokens = 4;
  static constexpr int kExpandGroups = 2;

  static F zero() { return F{}; }
  static F broadcast(float value) { return F{value, value, value, value}; }
  static F mul_add(F a, F b, F c) { return a * b + c; }
  static float sum(F f) { return (f[0] + f[2]) + (f[1] + f[3]); }

  template <class T>
  static F load(const T* p) {
    return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }

  template <class T>
  static F load(const T* p, int n) {
    F f{};
    for (int i = 0; i < n; ++i) f[i] = to_float(p[i]);
    return f;
  }

  template <class T>
  static void store(T* p, F f) {
    for (int i = 0; i < kWidth; ++i) from_float(f[i], p[i]);
  }

  template <class T>
  static void store(T* p, F f, int n) {
    for (int i = 0; i < n; ++i) from_float(f[i], p[i]);
  }
};

}  // namespace
}  // namespace toppings::cpu
