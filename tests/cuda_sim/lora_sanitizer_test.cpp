// SPDX-License-Identifier: Apache-2.0
#include "lora_problem.h"

// The kernels under AddressSanitizer and ThreadSanitizer, which also see what doesn't go through
// ptx.cuh.
namespace toppings::sim {
namespace {

void run_all(const Case& data) {
  for (const bool wide : {false, true}) {
    Problem problem(data);
    problem.adjust = [&](cuda::Config& config) { config.wide = wide; };
    for (const Order order : {Order::forward, Order::random}) {
      for (const Operator op : {Operator::forward, Operator::shrink, Operator::expand}) {
        expect_right(problem, op, {.order = order});
      }
    }
  }
}

TEST(Sanitizer, Bf16) {
  run_all({.tokens = 19, .in = 577, .widths = {70, 33}, .ranks = {3, 16, 72}});
  run_all({.tokens = 19, .in = 320, .widths = {64, 48}, .ranks = {8, 16, 72}, .aligned = true});
}

TEST(Sanitizer, F16) {
  run_all({.tokens = 5,
           .in = 577,
           .widths = {70, 33},
           .dtype = DType::f16,
           .a_dtype = DType::f16,
           .b_dtype = DType::f16,
           .ranks = {3, 40}});
}

TEST(Sanitizer, MixedDTypes) {
  run_all({.tokens = 5,
           .in = 577,
           .widths = {70, 33},
           .dtype = DType::bf16,
           .a_dtype = DType::f32,
           .b_dtype = DType::f16,
           .ranks = {3, 40}});
}

TEST(Sanitizer, PlanAndWindows) {
  Problem problem({.tokens = 300, .in = 40, .widths = {20}, .ranks = {3, 8, 16}});
  problem.adjust = [](cuda::Config& config) { config.window = 128; };
  expect_right(problem, Operator::forward, {.order = Order::random});
}

}  // namespace
}  // namespace toppings::sim
