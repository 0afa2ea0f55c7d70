// SPDX-License-Identifier: Apache-2.0
#include "cuda/call.h"

#include "cuda/tile.h"
#include "stages.h"

namespace toppings::cuda {

Call call_of(const LoraForward& forward) { return {.args = forward}; }

Call call_of(const LoraShrink& shrink) {
  return {
      .args = as_forward(shrink), .expands = false, .v = shrink.v, .v_rank = shrink.batch.max_rank};
}

Call call_of(const LoraExpand& expand) {
  Call call{.args = as_forward(expand),
            .shrinks = false,
            .v = const_cast<float*>(expand.v),
            .v_rank = expand.v_rank};
  if (call.args.batch.max_rank > expand.v_rank) call.args.batch.max_rank = expand.v_rank;
  return call;
}

Call part_of(const Call& call, std::int64_t first, std::int64_t count) {
  Call part = call;
  LoraBatch& batch = part.args.batch;
  batch.num_projections = count;
  batch.slots += first * batch.num_slots * 3;
  if (batch.scales != nullptr) batch.scales += first * batch.num_slots;
  if (part.v != nullptr) part.v += first * batch.tokens * part.v_rank;
  if (part.expands) {
    std::int64_t column = 0;
    for (const std::int64_t width : part.args.widths.first(static_cast<std::size_t>(first))) {
      column += width;
    }
    part.args.widths =
        part.args.widths.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    part.args.y = static_cast<std::byte*>(part.args.y) +
                  column * static_cast<std::int64_t>(size_of(part.args.dtype));
  }
  return part;
}

DType math_of(const Call& call) {
  const LoraForward& args = call.args;
  const bool same = (!call.shrinks || args.a_dtype == args.dtype) &&
                    (!call.expands || args.b_dtype == args.dtype);
  return same ? args.dtype : DType::f32;
}

Problem problem_of(const Call& call) {
  const LoraBatch& batch = call.args.batch;
  return {.tokens = batch.tokens,
          .num_slots = batch.num_slots,
          .num_projections = batch.num_projections,
          .in = call.shrinks ? call.args.in : 0,
          .widths = call.args.widths,
          .max_rank = batch.max_rank,
          .math_bytes = static_cast<std::int64_t>(size_of(math_of(call)))};
}

bool needs_plan(const Call& call) {
  return call.args.batch.plan == nullptr && call.args.batch.tokens > kSmallBatch;
}

LoraParams params_of(const Call& call, const Config& config, std::byte* workspace) {
  const LoraForward& args = call.args;
  const LoraBatch& batch = args.batch;
  LoraParams params{
      .slots = batch.slots,
      .scales = batch.scales,
      .token_slots = batch.token_slots,
      .plan = batch.plan,
      .num_slots = batch.num_slots,
      .tokens = static_cast<std::int32_t>(batch.tokens),
      .num_projections = static_cast<std::int32_t>(batch.num_projections),
      .max_rank = static_cast<std::int32_t>(batch.max_rank),
      .dtype = args.dtype,
      .a_dtype = args.a_dtype,
      .b_dtype = args.b_dtype,
      .window_begin = 0,
      .window_end = 0,
      .x = call.shrinks ? args.x : nullptr,
      .a = args.a,
      .x_stride = args.x_stride,
      .in = static_cast<std::int32_t>(args.in),
      .chunk = summation(args.in).chunk,
      .chunks_per_unit = config.chunks_per_unit,
      .units = config.units,
      .wanted_items = config.wanted_items,
      .v = {.data = reinterpret_cast<float*>(workspace + config.v_begin),
            .plane_stride = config.window * batch.num_projections * config.v_columns,
            .row_stride = batch.num_projections * config.v_columns,
            .projection_stride = config.v_columns,
            .count = config.units,
            .per_part = config.planes_per_part,
            .by_token = false},
      .y = call.expands ? args.y : nullptr,
      .b = args.b,
      .y_stride = args.y_stride,
      .columns = {},
      .v_out = call.expands ? nullptr : call.v,
      .counters = reinterpret_cast<std::uint32_t*>(workspace),
  };
  for (std::size_t s = 0; s < args.widths.size(); ++s) {
    params.columns[s + 1] = params.columns[s] + static_cast<std::int32_t>(args.widths[s]);
  }
  if (!call.shrinks) {
    params.v = {.data = call.v,
                .plane_stride = 0,
                .row_stride = call.v_rank,
                .projection_stride = batch.tokens * call.v_rank,
                .count = 1,
                .per_part = 1,
                .by_token = true};
  }
  if (needs_plan(call)) {
    params.plan = reinterpret_cast<const std::int32_t*>(workspace + config.plan_begin);
  }
  return params;
}

}  // namespace toppings::cuda
