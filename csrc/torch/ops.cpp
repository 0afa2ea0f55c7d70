// SPDX-License-Identifier: Apache-2.0
#include <toppings/cpu_level.h>
#include <toppings/lora.h>
#include <toppings/lora_plan.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "args.h"

// The operators' schemas, and their kernels on the CPU.
namespace {

using namespace toppings::torch_ops;  // NOLINT: args.h is made for these files

void lora_forward_(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                   const Tensor& slots, const Tensor& scales, const Tensor& token_slots,
                   const std::vector<std::int64_t>& widths, const std::optional<Tensor>& plan,
                   std::int64_t max_rank) {
  translate([&] {
    toppings::lora_forward(
        forward_args(y, x, a, b, slots, scales, token_slots, widths, plan, max_rank, {}));
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
    toppings::LoraShrink args = shrink_args(x, a, slots, token_slots, max_rank, plan, {});
    Tensor v = new_v(x, args.batch);
    args.v = static_cast<float*>(v.mutable_data_ptr());
    toppings::lora_shrink(args);
    return v;
  });
}

void lora_expand_(const Tensor& y, const Tensor& v, const Tensor& b, const Tensor& slots,
                  const Tensor& scales, const Tensor& token_slots,
                  const std::vector<std::int64_t>& widths, const std::optional<Tensor>& plan) {
  translate([&] {
    toppings::lora_expand(expand_args(y, v, b, slots, scales, token_slots, widths, plan, {}));
  });
}

Tensor lora_plan(const Tensor& token_slots, std::int64_t num_slots) {
  return translate([&] {
    Tensor plan = new_plan(token_slots, num_slots, {});
    toppings::lora_plan(static_cast<const std::int32_t*>(token_slots.const_data_ptr()),
                        token_slots.size(0), num_slots,
                        static_cast<std::int32_t*>(plan.mutable_data_ptr()));
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
