// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/dtype.h>

#include <cstdint>
#include <span>

// What the operators of lora.h take. T tokens, S projections that share their input, K input width,
// N_s output widths, L slots, r the slot's own rank in that projection.
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

}  // namespace toppings
