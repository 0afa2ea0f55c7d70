// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

// The CPU kernels of one instruction-set level, behind one table of function pointers. This header
// is included by files compiled for newer CPUs than the one at hand: it must not define an inline
// function or instantiate a template.
namespace toppings::cpu {

// v[i, j] = sum_k x[rows[i], k] a[j, k]
struct ShrinkArgs {
  std::int64_t tokens, ranks, in;
  const void* x;             // row rows[i] is token i
  std::int64_t x_stride;     // elements
  const std::int32_t* rows;  // [tokens]
  const void* a;             // [ranks, in]
  float* v;                  // [tokens, ranks]
  std::int64_t v_stride;
};

// y[rows[i], c] += scale * sum_j v[i, j] b[j, c], rounded once
struct ExpandArgs {
  std::int64_t tokens, ranks, columns;
  const void* v;  // [tokens, ranks]; fp32, or bf16 with an even stride and a zero after an odd rank
  std::int64_t v_stride;
  const void* b;  // [ranks, columns]
  std::int64_t b_stride;
  float scale;
  void* y;  // row rows[i] is token i
  std::int64_t y_stride;
  const std::int32_t* rows;  // [tokens]
};

// An element of v or y has the same bits whichever tile of a kernel computes it: every tile gives
// it one accumulator, the same steps along K or along the rank, the same treatment of the tail, the
// same horizontal sum.
using ShrinkFn = void (*)(const ShrinkArgs&);
using ExpandFn = void (*)(const ExpandArgs&);

// Indexed by DType.
struct Kernels {
  ShrinkFn shrink[3][3];   // [x][a]
  ExpandFn expand[3][3];   // [y][b], v in fp32
  ExpandFn expand_bf16;    // y, b and v in bf16, two rank rows at a time; null where no instruction
                           // does that
  std::int64_t rank_tile;  // splitting the rank or the columns between threads at multiples
  std::int64_t column_tile;  // of these wastes nothing
};

extern const Kernels kGenericKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

// The table of the level in use.
const Kernels& kernels();

}  // namespace toppings::cpu
