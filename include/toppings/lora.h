// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/dtype.h>
#include <toppings/export.h>

#include <cstdint>
#include <span>
#include <string_view>

// The operators on CPU memory. T tokens, S projections that share their input, K input width, N_s
// output widths, L slots, r the slot's own rank in that projection. For every token t with slot
// i = token_slots[t] >= 0:
//   y[t, s] += scales[s, i] * (x[t] A_{s,i}^T) B_{s,i}      accumulated in fp32, y rounded once.
// At level avx512_bf16, with x and all weights in bf16, x[t] A^T is rounded to bf16 once.
//
// Deterministic: the order of summation depends on (K, r, dtypes, level) alone, so a row's bits
// don't change with the batch, the other adapters, the thread count or the row's position. Any
// number of threads may call at once.
namespace toppings {

// Weights and who uses which.
struct LoraBatch {
  std::int64_t tokens;           // T
  std::int64_t num_slots;        // L
  std::int64_t num_projections;  // S
  const std::int64_t* slots;     // [S, L, 3] element offset of A in a, of B in b, rank (0: absent)
  const float* scales;           // [S, L]
  const std::int32_t* token_slots;     // [T], -1: no adapter
  const std::int32_t* plan = nullptr;  // [lora_plan_size(T, L)] made from token_slots; may be null
  std::int64_t max_rank = 512;         // a larger rank in use is an error
};

struct LoraForward {
  LoraBatch batch;
  DType dtype;  // of x and y
  DType a_dtype, b_dtype;
  std::int64_t in;                       // K
  std::span<const std::int64_t> widths;  // [S] N_s
  const void* x;                         // [T, K]; must not alias y
  std::int64_t x_stride;                 // elements from row to row
  void* y;                               // [T, sum N_s]
  std::int64_t y_stride;
  const void* a;  // A blocks [r, K] anywhere in a_size elements
  std::int64_t a_size;
  const void* b;  // B blocks [r, N_s] anywhere in b_size elements
  std::int64_t b_size;
};

// v[s, t, :r] = x[t] A_{s,i}^T, zero beyond the rank and for tokens without an adapter.
struct LoraShrink {
  LoraBatch batch;
  DType dtype, a_dtype;
  std::int64_t in;
  const void* x;  // [T, K]
  std::int64_t x_stride;
  const void* a;
  std::int64_t a_size;
  float* v;  // [S, T, max_rank], contiguous
};

// y[t, s] += scales[s, i] * v[s, t, :r] B_{s,i}
struct LoraExpand {
  LoraBatch batch;
  DType dtype, b_dtype;
  std::span<const std::int64_t> widths;
  const float* v;       // [S, T, v_rank], contiguous
  std::int64_t v_rank;  // >= every rank in use
  void* y;              // [T, sum N_s]
  std::int64_t y_stride;
  const void* b;
  std::int64_t b_size;
};

// All three throw invalid_argument, before anything is written.
TOPPINGS_EXPORT void lora_forward(const LoraForward& args);
TOPPINGS_EXPORT void lora_shrink(const LoraShrink& args);
TOPPINGS_EXPORT void lora_expand(const LoraExpand& args);

// Tokens grouped by slot, made once a step and shared by all layers. token_slots outside [-1, L) is
// an error.
TOPPINGS_EXPORT std::int64_t lora_plan_size(std::int64_t tokens, std::int64_t num_slots);
TOPPINGS_EXPORT void lora_plan(const std::int32_t* token_slots, std::int64_t tokens,
                               std::int64_t num_slots, std::int32_t* plan);

// Instruction-set levels of the CPU kernels, best first.
enum class CpuLevel : int { avx512_bf16 = 0, avx512 = 1, avx2 = 2, generic = 3 };

TOPPINGS_EXPORT std::string_view name_of(
    CpuLevel level) noexcept;  // "avx512_bf16", "avx512", "avx2", "generic"
TOPPINGS_EXPORT bool cpu_supports(CpuLevel level) noexcept;
TOPPINGS_EXPORT CpuLevel
cpu_level() noexcept;  // the level in use: the best supported one unless set
TOPPINGS_EXPORT void set_cpu_level(
    CpuLevel level);  // throws unsupported; not while an operator runs

}  // namespace toppings
