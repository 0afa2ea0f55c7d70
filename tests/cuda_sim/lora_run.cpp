// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>

#include "cuda/forward.cuh"
#include "cuda/plan_kernel.cuh"
#include "lora_problem.h"

namespace toppings::sim {
namespace {

template <class Math>
Report launch_tile(const cuda::LoraParams& params, bool wide, std::int64_t blocks,
                   const Options& options) {
  const auto run = [&]<class Tile>(Tile) {
    return launch(cuda::lora_kernel<Math, Tile>,
                  {.grid = {static_cast<unsigned>(blocks)},
                   .block = {cuda::kThreads<Tile>},
                   .shared_bytes = cuda::kSharedBytes<Tile>,
                   .overlaps_previous = true},
                  options, params);
  };
  return wide ? run(cuda::WideTile{}) : run(cuda::NarrowTile{});
}

Report launch_math(DType math, const cuda::LoraParams& params, bool wide, std::int64_t blocks,
                   const Options& options) {
  switch (math) {
    case DType::bf16:
      return launch_tile<cuda::bf16>(params, wide, blocks, options);
    case DType::f16:
      return launch_tile<cuda::f16>(params, wide, blocks, options);
    default:
      return launch_tile<float>(params, wide, blocks, options);
  }
}

}  // namespace

cuda::Call Problem::call(Operator op) {
  const LoraBatch batch{.tokens = data.tokens,
                        .num_slots = static_cast<std::int64_t>(data.ranks.size()),
                        .num_projections = static_cast<std::int64_t>(data.widths.size()),
                        .slots = slots_.data(),
                        .scales = scales_.data(),
                        .token_slots = token_slots.data(),
                        .plan = plan_.empty() ? nullptr : plan_.data(),
                        .max_rank = data.max_rank};
  if (op == Operator::shrink) {
    return cuda::call_of(LoraShrink{.batch = batch,
                                    .dtype = data.dtype,
                                    .a_dtype = data.a_dtype,
                                    .in = data.in,
                                    .x = x_.data(),
                                    .x_stride = x_stride_,
                                    .a = a_.data(),
                                    .a_size = 0,
                                    .v = reinterpret_cast<float*>(v_.data())});
  }
  if (op == Operator::expand) {
    return cuda::call_of(LoraExpand{.batch = batch,
                                    .dtype = data.dtype,
                                    .b_dtype = data.b_dtype,
                                    .widths = data.widths,
                                    .v = reinterpret_cast<const float*>(v_given_.data()),
                                    .v_rank = v_rank_,
                                    .y = y_.data(),
                                    .y_stride = y_stride_,
                                    .b = b_.data(),
                                    .b_size = 0});
  }
  return cuda::call_of(LoraForward{.batch = batch,
                                   .dtype = data.dtype,
                                   .a_dtype = data.a_dtype,
                                   .b_dtype = data.b_dtype,
                                   .in = data.in,
                                   .widths = data.widths,
                                   .x = x_.data(),
                                   .x_stride = x_stride_,
                                   .y = y_.data(),
                                   .y_stride = y_stride_,
                                   .a = a_.data(),
                                   .a_size = 0,
                                   .b = b_.data(),
                                   .b_size = 0});
}

std::vector<Memory> Problem::memory() {
  std::vector<Memory> memory = {{x_.data(), x_.bytes(), "x"},
                                {y_.data(), y_.bytes(), "y"},
                                {a_.data(), a_.bytes(), "a"},
                                {b_.data(), b_.bytes(), "b"},
                                {v_.data(), v_.bytes(), "v"},
                                {v_given_.data(), v_given_.bytes(), "given v"},
                                {slots_.data(), slots_.size() * 8, "slots"},
                                {scales_.data(), scales_.size() * 4, "scales"},
                                {token_slots.data(), token_slots.size() * 4, "token_slots"},
                                {plan_.data(), plan_.size() * 4, "plan"},
                                {workspace_.data(), workspace_.size() * sizeof(Line), "workspace"}};
  // All of it, weights and slots too, may be what the kernel before is writing.
  for (Memory& one : memory) one.of_previous = true;
  return memory;
}

Report Problem::run(Operator op, const Options& given) {
  y_ = y_before_;
  v_ = Numbers(DType::f32, want_v_.size(), data.aligned);
  std::memset(v_.data(), 0, v_.bytes());
  return run(call(op), given);
}

Report Problem::run(const cuda::Call& call, const Options& given) {
  Report total;
  cuda::for_each_part(call, [&](const cuda::Call& part) {
    config_ = cuda::choose(cuda::problem_of(part), gpu);
    adjust(config_);
    std::byte* workspace = new_workspace();
    Options options = given;
    if (options.memory.empty()) options.memory = memory();
    cuda::for_each_launch(
        part, config_, workspace,
        [&](std::int32_t* plan, const cuda::LoraParams& params) {
          total += launch(cuda::plan_kernel, cuda::plan_launch(), options,
                          cuda::PlanParams{.token_slots = params.token_slots,
                                           .plan = plan,
                                           .num_slots = params.num_slots,
                                           .tokens = params.tokens});
        },
        [&](const cuda::LoraParams& params) {
          total += launch_math(cuda::math_of(part), params, config_.wide, config_.blocks, options);
        });
  });
  return total;
}

// NaN, but for the counters: these are 0 in new memory, and otherwise as the last launch left them.
std::byte* Problem::new_workspace() {
  const auto lines = static_cast<std::size_t>(config_.workspace) / sizeof(Line) + 1;
  constexpr auto kCounters = static_cast<std::size_t>(cuda::kCountersBytes);
  const bool is_new = workspace_.size() < lines;
  if (is_new) workspace_.resize(lines);
  std::byte* workspace = workspace_.data()->bytes;
  if (is_new) std::memset(workspace, 0, kCounters);
  std::memset(workspace + kCounters, 0xff, workspace_.size() * sizeof(Line) - kCounters);
  return workspace;
}

bool Problem::counters_are_zero() const {
  if (workspace_.empty()) return true;
  const std::byte* begin = workspace_.data()->bytes;
  return std::all_of(begin, begin + cuda::kCountersBytes,
                     [](std::byte b) { return b == std::byte{0}; });
}

void expect_right(Problem& problem, Operator op, const Options& options) {
  SCOPED_TRACE(problem.data.text() + "\n" + name_of(options) + "\noperator " +
               std::to_string(static_cast<int>(op)));
  const Report report = problem.run(op, options);
  ASSERT_TRUE(report.ok()) << report.text();
  EXPECT_LE(problem.error(op), op == Operator::shrink ? 1e-5 : tolerance(problem.data.dtype));
  EXPECT_TRUE(problem.rest_is_untouched(op));
  EXPECT_TRUE(problem.counters_are_zero());
}

bool expect_right_everywhere(const Case& data, const std::function<void(cuda::Config&)>& adjust) {
  Problem problem(data);
  problem.adjust = adjust;
  for (const Options& options : all_schedules(1)) {
    for (const Operator op : {Operator::forward, Operator::shrink, Operator::expand}) {
      expect_right(problem, op, options);
      if (::testing::Test::HasFailure()) return false;
    }
  }
  return true;
}

}  // namespace toppings::sim
