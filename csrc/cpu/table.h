// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cpu/expand_panels.h"
#include "cpu/expand_stream.h"
#include "cpu/shrink.h"

// A level's table. Everything is in an unnamed namespace: see kernels.h.
namespace toppings::cpu {
namespace {

template <class Unit, class Y, class W>
void expand(const ExpandArgs& args) {
  // Each part of the scratch begins on a cache line.
  const auto lines = [](std::int64_t floats) { return (floats + 15) / 16 * 16; };
  const std::int64_t steps = (args.ranks + Unit::kElements - 1) / Unit::kElements;
  auto** y = reinterpret_cast<Y**>(args.scratch);
  float* units = reinterpret_cast<float*>(args.scratch) + lines(2 * args.tokens);
  float* rest = units + lines(args.tokens * steps);
  for (std::int64_t t = 0; t < args.tokens; ++t) {
    y[t] = static_cast<Y*>(args.y) + args.rows[t] * args.y_stride;
    Unit::scale_v(args.v + t * args.v_stride, args.ranks, args.scale, units + t * steps);
  }
  if (args.tokens < kFewTokens) {
    expand_stream<Unit, W>(args, units, y, rest);
  } else {
    expand_panels<Unit, W>(args, units, y, rest);
  }
}

template <class X>
constexpr void fill_fp32(ShrinkFn (&shrinks)[3], ExpandFn (&expands)[3]) {
  shrinks[0] = shrink<UnitF32, X, float>;
  shrinks[1] = shrink<UnitF32, X, f16>;
  shrinks[2] = shrink<UnitF32, X, bf16>;
  expands[0] = expand<UnitF32, X, float>;
  expands[1] = expand<UnitF32, X, f16>;
  expands[2] = expand<UnitF32, X, bf16>;
}

// In the order of DType: fp32, fp16, bf16.
constexpr Kernels fp32_kernels() {
  Kernels kernels{};
  fill_fp32<float>(kernels.shrink[0], kernels.expand[0]);
  fill_fp32<f16>(kernels.shrink[1], kernels.expand[1]);
  fill_fp32<bf16>(kernels.shrink[2], kernels.expand[2]);
  kernels.rank_tile = 4;
  kernels.column_tile = kPanelColumns;
  return kernels;
}

}  // namespace
}  // namespace toppings::cpu
