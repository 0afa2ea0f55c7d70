// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
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
  // Rows of memory that few tokens prefetch towards the end: what expand begins with. None: 0 rows.
  const std::byte* next;
  std::int64_t next_rows, next_bytes;  // next_bytes: of a row
};

// y[rows[i], c] += scale * sum_j v[i, j] b[j, c], rounded once
struct ExpandArgs {
  std::int64_t tokens, ranks, columns;
  const float* v;  // [tokens, ranks]
  std::int64_t v_stride;
  const void* b;  // [ranks, columns]
  std::int64_t b_stride;
  float scale;
  void* y;  // row rows[i] is token i
  std::int64_t y_stride;
  const std::int32_t* rows;  // [tokens]
  std::byte* scratch;        // [scratch_bytes(tokens, ranks)], on kScratchAlignment
  // Memory that few tokens prefetch towards the end: what comes after this call. May be 0 bytes.
  const std::byte* next;
  std::int64_t next_bytes;
};

// An element of v or y has the same bits whichever tile of a kernel computes it: every tile gives
// it the same steps along K or along the rank, the same treatment of the tail, the same order of
// additions.
using ShrinkFn = void (*)(const ShrinkArgs&);
using ExpandFn = void (*)(const ExpandArgs&);

// Below this many tokens expand streams B from memory; from it on, it copies panels of B: of so
// many columns, or half of them for more rank rows than these, so that up to rank 128 (bf16; 64 in
// fp32) a panel and what else a tile reads fit into the first-level cache.
inline constexpr std::int64_t kFewTokens = 6;
inline constexpr std::int64_t kPanelColumns = 128;
inline constexpr std::int64_t kPanelRanks = 64;

// Rank rows that expand reads side by side for few tokens, and the sums it keeps meanwhile.
inline constexpr std::int64_t kStreams = 8;
inline constexpr std::int64_t kPartialFloats = 8192;

// What expand needs: the scaled v, and a panel or the partial sums.
inline constexpr std::size_t kScratchAlignment = 64;
std::size_t scratch_bytes(std::int64_t tokens, std::int64_t ranks);

// Indexed by DType.
struct Kernels {
  ShrinkFn shrink[3][3];     // [x][a]
  ExpandFn expand[3][3];     // [y][b]
  ExpandFn expand_bf16;      // y, b in bf16, and scale * v rounded to bf16 once; null where no
                             // instruction multiplies bf16
  std::int64_t rank_tile;    // splitting the rank or the columns between threads at multiples
  std::int64_t column_tile;  // of these wastes nothing
};

extern const Kernels kGenericKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

// The table of the level in use.
const Kernels& kernels();

}  // namespace toppings::cpu
