// SPDX-License-Identifier: Apache-2.0
#include <toppings/cpu_level.h>
#include <toppings/error.h>
#include <toppings/lora.h>
#include <toppings/lora_plan.h>
#include <torch/csrc/stable/library.h>
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
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_cpu(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name,
                  ": expected a tensor on the CPU, got one on another device");
}

void check_dim(const char* name, const Tensor& tensor, std::int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
}

void check_size(const char* name, const Tensor& tensor, std::int64_t dim, std::int64_t size) {
  STD_TORCH_CHECK(tensor.size(dim) == size, name, ": expected size ", size, " in dimension ", dim,
                  ", got ", tensor.size(dim));
}

void check_type(const char* name, const Tensor& tensor, ScalarType type, const char* type_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, ": expected ", type_name,
                  ", got scalar type ", static_cast<int>(tensor.scalar_type()));
}

void check_contiguous(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides");
}

toppings::DType float_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return toppings::DType::f32;
    case ScalarType::Half:
      return toppings::DType::f16;
    case ScalarType::BFloat16:
      return toppings::DType::bf16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float16 or bfloat16, got scalar type ",
                      static_cast<int>(tensor.scalar_type()));
  }
}

// [T, n] with contiguous rows; returns the stride from row to row.
std::int64_t check_rows(const char* name, const Tensor& tensor, std::int64_t tokens) {
  check_cpu(name, tensor);
  check_dim(name, tensor, 2);
  check_size(name, tensor, 0, tokens);
  STD_TORCH_CHECK(tensor.size(1) <= 1 || tensor.stride(1) == 1, name,
                  ": expected a contiguous last dimension, got stride ", tensor.stride(1));
  return tensor.stride(0);
}

void check_storage(const char* name, const Tensor& tensor) {
  check_cpu(name, tensor);
  check_dim(name, tensor, 1);
  check_contiguous(name, tensor);
}

toppings::LoraBatch make_batch(const Tensor& slots, const Tensor* scales, const Tensor& token_slots,
                               const std::optional<Tensor>& plan, std::int64_t max_rank) {
  check_cpu("token_slots", token_slots);
  check_dim("token_slots", token_slots, 1);
  check_type("token_slots", token_slots, ScalarType::Int, "int32");
  check_contiguous("token_slots", token_slots);
  check_cpu("slots", slots);
  check_dim("slots", slots, 3);
  check_size("slots", slots, 2, 3);
  check_type("slots", slots, ScalarType::Long, "int64");
  check_contiguous("slots", slots);
  toppings::LoraBatch batch{
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
    check_cpu("scales", *scales);
    check_dim("scales", *scales, 2);
    check_size("scales", *scales, 0, batch.num_projections);
    check_size("scales", *scales, 1, batch.num_slots);
    check_type("scales", *scales, ScalarType::Float, "float32");
    check_contiguous("scales", *scales);
    batch.scales = static_cast<const float*>(scales->const_data_ptr());
  }
  if (plan.has_value()) {
    check_cpu("plan", *plan);
    check_dim("plan", *plan, 1);
    check_size("plan", *plan, 0, toppings::lora_plan_size(batch.tokens, batch.num_slots));
    check_type("plan", *plan, ScalarType::Int, "int32");
    check_contiguous("plan", *plan);
    batch.plan = static_cast<const std::int32_t*>(plan->const_data_ptr());
  }
  return batch;
}

void check_widths(const Tensor& y, const std::vector<std::int64_t>& widths,
                  std::int64_t num_projections) {
  STD_TORCH_CHECK(static_cast<std::int64_t>(widths.size()) == num_projections, "widths: expected ",
                  num_projections, " of them, one for each projection in slots, got ",
                  widths.size());
  std::int64_t sum = 0;
  for (const std::int64_t width : widths) sum += width;
  STD_TORCH_CHECK(y.size(1) == sum, "y: expected size ", sum,
                  " in dimension 1, the sum of widths, got ", y.size(1));
}

// The library's errors, as those of any other operator.
template <class F>
auto translate(F f) {
  try {
    return f();
  } catch (const toppings::Error& error) {
    STD_TORCH_CHECK(false, error.what());
  }
}

void lora_forward_(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                   const Tensor& slots, const Tensor& scales, const Tensor& token_slots,
                   const std::vector<std::int64_t>& widths, const std::optional<Tensor>& plan,
                   std::int64_t max_rank) {
  translate([&] {
    const toppings::LoraBatch batch = make_batch(slots, &scales, token_slots, plan, max_rank);
    const std::int64_t x_stride = check_rows("x", x, batch.tokens);
    const std::int64_t y_stride = check_rows("y", y, batch.tokens);
    check_widths(y, widths, batch.num_projections);
    STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "x: expected the dtype of y, scalar type ",
                    static_cast<int>(y.scalar_type()), ", got ", static_cast<int>(x.scalar_type()));
    check_storage("a", a);
    check_storage("b", b);
    toppings::lora_forward({
        .batch = batch,
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
        .b_size = b.size(0),
    });
  });
}

Tensor lora_forward(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                    const Tensor& slots, const Tensor& scales, const Tensor& token_slots,
                    const std::vector<std::int64_t>& widths, const std::optional<Tensor>& plan,
                    std::int64_t max_rank) {
  Tensor result = torch::stable::new_empty(y, y.sizes());
  torch::stable::copy_(result, y);
  lora_forward_(result, x, a, b, slots, scales, token_slots, widths, plan, max_rank);
  return result;
}

Tensor lora_shrink(const Tensor& x, const Tensor& a, const Tensor& slots, const Tensor& token_slots,
                   std::int64_t max_rank, const std::optional<Tensor>& plan) {
  return translate([&] {
    const toppings::LoraBatch batch = make_batch(slots, nullptr, token_slots, plan, max_rank);
    const std::int64_t x_stride = check_rows("x", x, batch.tokens);
    check_storage("a", a);
    STD_TORCH_CHECK(max_rank >= 0, "max_rank: expected >= 0, got ", max_rank);
    const std::array<std::int64_t, 3> shape{batch.num_projections, batch.tokens, max_rank};
    Tensor v = torch::stable::new_empty(x, {shape.data(), shape.size()}, ScalarType::Float);
    toppings::lora_shrink({
        .batch = batch,
        .dtype = float_type("x", x),
        .a_dtype = float_type("a", a),
        .in = x.size(1),
        .x = x.const_data_ptr(),
        .x_stride = x_stride,
        .a = a.const_data_ptr(),
        .a_size = a.size(0),
        .v = static_cast<float*>(v.mutable_data_ptr()),
    });
    return v;
  });
}

void lora_expand_(const Tensor& y, const Tensor& v, const Tensor& b, const Tensor& slots,
                  const Tensor& scales, const Tensor& token_slots,
                  const std::vector<std::int64_t>& widths, const std::optional<Tensor>& plan) {
  translate([&] {
    check_cpu("v", v);
    check_dim("v", v, 3);
    const toppings::LoraBatch batch = make_batch(slots, &scales, token_slots, plan, v.size(2));
    check_size("v", v, 0, batch.num_projections);
    check_size("v", v, 1, batch.tokens);
    check_type("v", v, ScalarType::Float, "float32");
    check_contiguous("v", v);
    const std::int64_t y_stride = check_rows("y", y, batch.tokens);
    check_widths(y, widths, batch.num_projections);
    check_storage("b", b);
    toppings::lora_expand({
        .batch = batch,
        .dtype = float_type("y", y),
        .b_dtype = float_type("b", b),
        .widths = widths,
        .v = static_cast<const float*>(v.const_data_ptr()),
        .v_rank = v.size(2),
        .y = y.mutable_data_ptr(),
        .y_stride = y_stride,
        .b = b.const_data_ptr(),
        .b_size = b.size(0),
    });
  });
}

Tensor lora_plan(const Tensor& token_slots, std::int64_t num_slots) {
  return translate([&] {
    check_cpu("token_slots", token_slots);
    check_dim("token_slots", token_slots, 1);
    check_type("token_slots", token_slots, ScalarType::Int, "int32");
    check_contiguous("token_slots", token_slots);
    const std::int64_t tokens = token_slots.size(0);
    const std::array<std::int64_t, 1> shape{toppings::lora_plan_size(tokens, num_slots)};
    Tensor plan = torch::stable::new_empty(token_slots, {shape.data(), shape.size()});
    toppings::lora_plan(static_cast<const std::int32_t*>(token_slots.const_data_ptr()), tokens,
                        num_slots, static_cast<std::int32_t*>(plan.mutable_data_ptr()));
    return plan;
  });
}

// The instruction-set level, as the number of a toppings::CpuLevel: toppings/cpu.py gives them
// their names.
std::int64_t cpu_level() { return static_cast<std::int64_t>(toppings::cpu_level()); }

toppings::CpuLevel level_of(std::int64_t level) {
  STD_TORCH_CHECK(level >= 0 && level <= 3, "level: expected 0 to 3, got ", level);
  return static_cast<toppings::CpuLevel>(level);
}

bool cpu_supports(std::int64_t level) { return toppings::cpu_supports(level_of(level)); }

void set_cpu_level(std::int64_t level) {
  translate([&] { toppings::set_cpu_level(level_of(level)); });
}

}  // namespace

STABLE_TORCH_LIBRARY(toppings, m) {
  m.def(
      "lora_forward(Tensor y, Tensor x, Tensor a, Tensor b, Tensor slots, Tensor scales, Tensor "
      "token_slots, "
      "int[] widths, Tensor? plan=None, int max_rank=512) -> Tensor");
  m.def(
      "lora_forward_(Tensor(a!) y, Tensor x, Tensor a, Tensor b, Tensor slots, Tensor scales, "
      "Tensor token_slots, "
      "int[] widths, Tensor? plan=None, int max_rank=512) -> ()");
  m.def(
      "lora_shrink(Tensor x, Tensor a, Tensor slots, Tensor token_slots, int max_rank, Tensor? "
      "plan=None) -> Tensor");
  m.def(
      "lora_expand_(Tensor(a!) y, Tensor v, Tensor b, Tensor slots, Tensor scales, Tensor "
      "token_slots, "
      "int[] widths, Tensor? plan=None) -> ()");
  m.def("lora_plan(Tensor token_slots, int num_slots) -> Tensor");
  m.def("_cpu_level() -> int");
  m.def("_cpu_supports(int level) -> bool");
  m.def("_set_cpu_level(int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(toppings, CPU, m) {
  m.impl("lora_forward", TORCH_BOX(&lora_forward));
  m.impl("lora_forward_", TORCH_BOX(&lora_forward_));
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_expand_));
  m.impl("lora_plan", TORCH_BOX(&lora_plan));
}

STABLE_TORCH_LIBRARY_IMPL(toppings, CompositeExplicitAutograd, m) {
  m.impl("_cpu_level", TORCH_BOX(&cpu_level));
  m.impl("_cpu_supports", TORCH_BOX(&cpu_supports));
  m.impl("_set_cpu_level", TORCH_BOX(&set_cpu_level));
}
