// SPDX-License-Identifier: Apache-2.0
#include "assist/compute.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "lora_serial.h"

namespace toppings::assist {
namespace {

void check_dtype(const char* what, DType dtype) {
  check_index(what, static_cast<std::int64_t>(dtype), 3);
}

void check_size(const char* what, std::int64_t bytes, std::int64_t most) {
  if (bytes <= most) return;
  fail(Status::invalid_argument, what, "at most the slot's " + std::to_string(most) + " bytes",
       std::to_string(bytes));
}

// [rows, columns] of the weights at `offset`.
void check_block(const Region& region, std::int64_t offset, std::int64_t rows, std::int64_t columns,
                 std::int64_t size) {
  const bool is_inside = offset >= 0 && offset % size == 0 && offset <= region.bytes &&
                         rows * columns <= (region.bytes - offset) / size;
  if (is_inside) return;
  fail(Status::invalid_argument, "weights",
       std::to_string(rows * columns) + " elements within a region of " +
           std::to_string(region.bytes) + " bytes",
       "offset " + std::to_string(offset));
}

// Every address is an offset from one that exists: the first block's.
std::int64_t lowest_offset(const Task& task) {
  std::int64_t lowest = std::numeric_limits<std::int64_t>::max();
  for (int s = 0; s < task.num_projections; ++s) {
    const TaskProjection& p = task.projections[static_cast<std::size_t>(s)];
    if (p.rank > 0) lowest = std::min({lowest, p.a_offset, p.b_offset});
  }
  return lowest;
}

}  // namespace

void check_task(const Task& task, std::int64_t x_bytes, std::int64_t deltas_bytes) {
  check_index("tokens", task.tokens, std::numeric_limits<std::int32_t>::max());
  check_positive("in", task.in);
  check_positive("num_projections", task.num_projections);
  check_index("num_projections - 1", task.num_projections - 1, kMaxProjections);
  check_dtype("dtype", task.dtype);
  check_dtype("weight_dtype", task.weight_dtype);
  for (int s = 0; s < task.num_projections; ++s) {
    check_positive("out", task.projections[static_cast<std::size_t>(s)].out);
    check_index("rank", task.projections[static_cast<std::size_t>(s)].rank,
                std::numeric_limits<std::int32_t>::max());
  }
  // A product of a row and of tokens, each below 2^37, could overflow.
  const auto rows = [&](std::int64_t columns) {
    return columns * static_cast<std::int64_t>(size_of(task.dtype));
  };
  check_size("a row of x", rows(task.in), x_bytes);
  check_size("a row of deltas", rows(task.columns()), deltas_bytes);
  check_index("tokens", task.tokens, (std::int64_t{1} << 24));
  check_size("x", task.x_bytes(), x_bytes);
  check_size("deltas", task.deltas_bytes(), deltas_bytes);
}

void check_weights(const Task& task, std::span<const Region> regions) {
  check_index("region", task.region, std::ssize(regions));
  const Region& region = regions[static_cast<std::size_t>(task.region)];
  const auto size = static_cast<std::int64_t>(size_of(task.weight_dtype));
  for (int s = 0; s < task.num_projections; ++s) {
    const TaskProjection& p = task.projections[static_cast<std::size_t>(s)];
    if (p.rank == 0) continue;
    check_block(region, p.a_offset, p.rank, task.in, size);
    check_block(region, p.b_offset, p.rank, p.out, size);
  }
}

void compute(const Task& task, std::span<const Region> regions, const std::byte* x,
             std::byte* deltas, std::int64_t first, std::int64_t count) {
  const auto size = static_cast<std::int64_t>(size_of(task.dtype));
  const std::int64_t columns = task.columns();
  std::byte* const y = deltas + first * columns * size;
  std::memset(y, 0, static_cast<std::size_t>(count * columns * size));

  const std::int64_t lowest = lowest_offset(task);
  if (lowest == std::numeric_limits<std::int64_t>::max()) return;  // no projection is there
  const auto base =
      reinterpret_cast<std::intptr_t>(regions[static_cast<std::size_t>(task.region)].base) + lowest;
  const auto weight_size = static_cast<std::int64_t>(size_of(task.weight_dtype));
  std::array<std::int64_t, kMaxProjections * 3> slots{};
  std::array<std::int64_t, kMaxProjections> widths{};
  std::array<float, kMaxProjections> scales{};
  std::int64_t max_rank = 0, elements = 0;
  for (int i = 0; i < task.num_projections; ++i) {
    const auto s = static_cast<std::size_t>(i);
    const TaskProjection& p = task.projections[s];
    widths[s] = p.out;
    scales[s] = p.scale;
    if (p.rank == 0) continue;
    const std::int64_t a = (p.a_offset - lowest) / weight_size;
    const std::int64_t b = (p.b_offset - lowest) / weight_size;
    slots[s * 3] = a;
    slots[s * 3 + 1] = b;
    slots[s * 3 + 2] = p.rank;
    max_rank = std::max<std::int64_t>(max_rank, p.rank);
    elements =
        std::max({elements, a + std::int64_t{p.rank} * task.in, b + std::int64_t{p.rank} * p.out});
  }
  static thread_local std::vector<std::int32_t> token_slots;  // all 0
  if (std::ssize(token_slots) < count) token_slots.resize(static_cast<std::size_t>(count));
  lora_forward_serial(
      {.batch = {.tokens = count,
                 .num_slots = 1,
                 .num_projections = task.num_projections,
                 .slots = slots.data(),
                 .scales = scales.data(),
                 .token_slots = token_slots.data(),
                 .max_rank = max_rank},
       .dtype = task.dtype,
       .a_dtype = task.weight_dtype,
       .b_dtype = task.weight_dtype,
       .in = task.in,
       .widths = std::span(widths).first(static_cast<std::size_t>(task.num_projections)),
       .x = x + first * task.in * size,
       .x_stride = task.in,
       .y = y,
       .y_stride = columns,
       .a = reinterpret_cast<const void*>(base),
       .a_size = elements,
       .b = reinterpret_cast<const void*>(base),
       .b_size = elements});
}

}  // namespace toppings::assist
