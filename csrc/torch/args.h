// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/error.h>
#include <toppings/lora_args.h>
#include <toppings/lora_plan.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <cstdint>
#include <optional>
#include <vector>

// Tensors in, pointers and sizes out: what a tensor must be is checked here, what its contents must
// be in the library.
namespace toppings::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The CPU, or a CUDA device by its number.
struct Place {
  bool cuda = false;
  std::int32_t index = -1;
};

inline Place place_of(const Tensor& tensor) {
  return tensor.is_cpu() ? Place{} : Place{.cuda = true, .index = tensor.get_device_index()};
}

inline void check_place(const char* name, const Tensor& tensor, Place place) {
  if (place.cuda) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == place.index, name,
                    ": expected a tensor on cuda:", place.index, ", got one on another device");
  } else {
    STD_TORCH_CHECK(tensor.is_cpu(), name,
                    ": expected a tensor on the CPU, got one on another device");
  }
}

inline void check_dim(const char* name, const Tensor& tensor, std::int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
}

inline void check_size(const char* name, const Tensor& tensor, std::int64_t dim,
                       std::int64_t size) {
  STD_TORCH_CHECK(tensor.size(dim) == size, name, ": expected size ", size, " in dimension ", dim,
                  ", got ", tensor.size(dim));
}

inline void check_type(const char* name, const Tensor& tensor, ScalarType type,
                       const char* type_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": expected ", type_name,
                  ", got scalar type ", static_cast<int>(tensor.scalar_type()));
}

inline void check_contiguous(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides");
}

inline DType float_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16, got scalar type ",
                      static_cast<int>(tensor.scalar_type()));
  }
}

// [T, n] with contiguous rows; returns the stride from row to row.
inline std::int64_t check_rows(const char* name, const Tensor& tensor, std::int64_t tokens,
                               Place place) {
  check_place(name, tensor, place);
  check_dim(name, tensor, 2);
  check_size(name, tensor, 0, tokens);
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, name,
                  ": expected a contiguous last dimension, got stride ", tensor.stride(1));
  return tensor.stride(0);
}

inline void check_storage(const char* name, const Tensor& tensor, Place place) {
  check_place(name, tensor, place);
  check_dim(name, tensor, 1);
  check_contiguous(name, tensor);
}

inline LoraBatch make_batch(const Tensor& slots, const Tensor* scales, const Tensor& token_slots,
                            const std::optional<Tensor>& plan, std::int64_t max_rank, Place place) {
  check_place("token_slots", token_slots, place);
  check_dim("token_slots", token_slots, 1);
  check_type("token_slots", token_slots, ScalarType::Int, "int32");
  check_contiguous("token_slots", token_slots);
  check_place("slots", slots, place);
  check_dim("slots", slots, 3);
  check_size("slots", slots, 2, 3);
  check_type("slots", slots, ScalarType::Long, "int64");
  check_contiguous("slots", slots);
  LoraBatch batch{
      .tokens = token_slots.size(0),
      .num_slots = slots.size(1),
      .num_projections = slots.size(0),
      .slots = static_cast<const std::int64_t*>(slots.const_data_ptr()),
      .scales = nullptr,
      .token_slots = static_cast<const std::int32_t*>(token_slots.const_data_ptr()),
      .plan = nullptr,
      .max_rank = max_rank,
  };
  if (scales != nullptr) {
    check_place("scales", *scales, place);
    check_dim("scales", *scales, 2);
    check_size("scales", *scales, 0, batch.num_projections);
    check_size("scales", *scales, 1, batch.num_slots);
    check_type("scales", *scales, ScalarType::Float, "float32");
    check_contiguous("scales", *scales);
    batch.scales = static_cast<const float*>(scales->const_data_ptr());
  }
  if (plan.has_value()) {
    check_place("plan", *plan, place);
    check_dim("plan", *plan, 1);
    check_size("plan", *plan, 0, lora_plan_size(batch.tokens, batch.num_slots));
    check_type("plan", *plan, ScalarType::Int, "int32");
    check_contiguous("plan", *plan);
    batch.plan = static_cast<const std::int32_t*>(plan->const_data_ptr());
  }
  return batch;
}

inline void check_widths(const Tensor& y, const std::vector<std::int64_t>& widths,
                         std::int64_t num_projections) {
  STD_TORCH_CHECK(static_cast<std::int64_t>(widths.size()) == num_projections, "widths: expected ",
                  num_projections, " of them, one for each projection in slots, got ",
                  widths.size());
  std::int64_t sum = 0;
  for (const std::int64_t width : widths) sum += width;
  STD_TORCH_CHECK(y.size(1) == sum, "y: expected size ", sum,
                  " in dimension 1, the sum of widths, got ", y.size(1));
}

// What the operators of the library get; everything is to be where y (or x) is.
inline LoraForward forward_args(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                const Tensor& slots, const Tensor& scales,
                                const Tensor& token_slots, const std::vector<std::int64_t>& widths,
                                const std::optional<Tensor>& plan, std::int64_t max_rank,
                                Place place) {
  const LoraBatch batch = make_batch(slots, &scales, token_slots, plan, max_rank, place);
  const std::int64_t x_stride = check_rows("x", x, batch.tokens, place);
  const std::int64_t y_stride = check_rows("y", y, batch.tokens, place);
  check_widths(y, widths, batch.num_projections);
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "x: expected the dtype of y, scalar type ",
                  static_cast<int>(y.scalar_type()), ", got ", static_cast<int>(x.scalar_type()));
  check_storage("a", a, place);
  check_storage("b", b, place);
  return {.batch = batch,
          .dtype = float_type("x", x),
          .a_dtype = float_type("a", a),
          .b_dtype = float_type("b", b),
          .in = x.size(1),
          .widths = widths,
          .x = x.const_data_ptr(),
          .x_stride = x_stride,
          .y = y.mutable_data_ptr(),
          .y_stride = y_stride,
          .a = a.const_data_ptr(),
          .a_size = a.size(0),
          .b = b.const_data_ptr(),
          .b_size = b.size(0)};
}

inline LoraShrink shrink_args(const Tensor& x, const Tensor& a, const Tensor& slots,
                              const Tensor& token_slots, std::int64_t max_rank,
                              const std::optional<Tensor>& plan, Place place) {
  const LoraBatch batch = make_batch(slots, nullptr, token_slots, plan, max_rank, place);
  const std::int64_t x_stride = check_rows("x", x, batch.tokens, place);
  check_storage("a", a, place);
  STD_TORCH_CHECK(max_rank >= 0, "max_rank: expected >= 0, got ", max_rank);
  return {.batch = batch,
          .dtype = float_type("x", x),
          .a_dtype = float_type("a", a),
          .in = x.size(1),
          .x = x.const_data_ptr(),
          .x_stride = x_stride,
          .a = a.const_data_ptr(),
          .a_size = a.size(0),
          .v = nullptr};
}

// float32 [S, T, max_rank], uninitialized.
inline Tensor new_v(const Tensor& like, const LoraBatch& batch) {
  const std::array<std::int64_t, 3> shape{batch.num_projections, batch.tokens, batch.max_rank};
  return torch::stable::new_empty(like, {shape.data(), shape.size()}, ScalarType::Float);
}

inline LoraExpand expand_args(const Tensor& y, const Tensor& v, const Tensor& b,
                              const Tensor& slots, const Tensor& scales, const Tensor& token_slots,
                              const std::vector<std::int64_t>& widths,
                              const std::optional<Tensor>& plan, Place place) {
  check_place("v", v, place);
  check_dim("v", v, 3);
  const LoraBatch batch = make_batch(slots, &scales, token_slots, plan, v.size(2), place);
  check_size("v", v, 0, batch.num_projections);
  check_size("v", v, 1, batch.tokens);
  check_type("v", v, ScalarType::Float, "float32");
  check_contiguous("v", v);
  const std::int64_t y_stride = check_rows("y", y, batch.tokens, place);
  check_widths(y, widths, batch.num_projections);
  check_storage("b", b, place);
  return {.batch = batch,
          .dtype = float_type("y", y),
          .b_dtype = float_type("b", b),
          .widths = widths,
          .v = static_cast<const float*>(v.const_data_ptr()),
          .v_rank = v.size(2),
          .y = y.mutable_data_ptr(),
          .y_stride = y_stride,
          .b = b.const_data_ptr(),
          .b_size = b.size(0)};
}

// [lora_plan_size(T, L)], uninitialized.
inline Tensor new_plan(const Tensor& token_slots, std::int64_t num_slots, Place place) {
  check_place("token_slots", token_slots, place);
  check_dim("token_slots", token_slots, 1);
  check_type("token_slots", token_slots, ScalarType::Int, "int32");
  check_contiguous("token_slots", token_slots);
  const std::array<std::int64_t, 1> shape{lora_plan_size(token_slots.size(0), num_slots)};
  return torch::stable::new_empty(token_slots, {shape.data(), shape.size()});
}

// The library's errors, as those of any other operator.
template <class F>
auto translate(F f) {
  try {
    return f();
  } catch (const Error& error) {
    STD_TORCH_CHECK(false, error.what());
  }
}

}  // namespace toppings::torch_ops
