// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <toppings/assist/workers.h>
#include <toppings/lora.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "testing.h"

namespace toppings::assist {

using std::chrono::milliseconds;
using std::chrono::seconds;

// Longer than anything takes, also under a sanitizer on a busy machine.
constexpr seconds kLong{60};

constexpr Geometry kGeometry{.num_slots = 4, .x_bytes = 1 << 16, .deltas_bytes = 1 << 17};

inline bool eventually(const std::function<bool()>& condition) {
  const auto deadline = std::chrono::steady_clock::now() + kLong;
  while (std::chrono::steady_clock::now() < deadline) {
    if (condition()) return true;
    std::this_thread::sleep_for(milliseconds(1));
  }
  return false;
}

// The deltas that lora_forward itself makes of a task.
inline std::vector<std::byte> operators_deltas(const Task& task, const void* x,
                                               const Region& region) {
  const auto size = static_cast<std::int64_t>(size_of(task.weight_dtype));
  std::vector<std::int64_t> slots, widths;
  std::vector<float> scales;
  std::int64_t max_rank = 0, first = INT64_MAX;
  const std::span projections(task.projections.data(),
                              static_cast<std::size_t>(task.num_projections));
  for (const TaskProjection& p : projections) {
    if (p.rank > 0) first = std::min({first, p.a_offset, p.b_offset});
  }
  for (const TaskProjection& p : projections) {
    const std::int64_t base = p.rank > 0 ? first : p.a_offset;
    slots.insert(slots.end(), {(p.a_offset - base) / size, (p.b_offset - base) / size, p.rank});
    scales.push_back(p.scale);
    widths.push_back(p.out);
    max_rank = std::max<std::int64_t>(max_rank, p.rank);
  }
  const std::vector<std::int32_t> token_slots(static_cast<std::size_t>(task.tokens), 0);
  std::vector<std::byte> y(static_cast<std::size_t>(task.deltas_bytes()));
  if (max_rank == 0) return y;
  const auto* weights =
      reinterpret_cast<const std::byte*>(reinterpret_cast<std::intptr_t>(region.base) + first);
  lora_forward({.batch = {.tokens = task.tokens,
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
                .widths = widths,
                .x = x,
                .x_stride = task.in,
                .y = y.data(),
                .y_stride = task.columns(),
                .a = weights,
                .a_size = std::int64_t{1} << 40,
                .b = weights,
                .b_size = std::int64_t{1} << 40});
  return y;
}

// A task with weights of its own, x, and the deltas it should give. One projection is absent.
struct Problem {
  Task task{};
  std::vector<std::byte> weights, x, want;

  explicit Problem(int tokens, DType dtype = DType::bf16, DType weight_dtype = DType::bf16,
                   std::uint64_t seed = 1) {
    constexpr int kIn = 96;
    const auto size = static_cast<std::int64_t>(size_of(weight_dtype));
    task.tokens = tokens;
    task.in = kIn;
    task.num_projections = 3;
    task.dtype = dtype;
    task.weight_dtype = weight_dtype;
    std::int64_t elements = 0;
    const int ranks[] = {8, 0, 5}, outs[] = {96, 32, 40};
    for (std::size_t s = 0; s < 3; ++s) {
      TaskProjection& p = task.projections[s];
      p.out = outs[s];
      p.rank = ranks[s];
      p.scale = 0.5F + static_cast<float>(s);
      p.a_offset = elements * size;
      p.b_offset = (elements + ranks[s] * kIn) * size;
      elements += ranks[s] * (kIn + outs[s]);
    }
    std::mt19937_64 random(seed);
    weights = testing::as_dtype(testing::random_floats(static_cast<std::size_t>(elements), random),
                                weight_dtype);
    if (tokens > 0) {
      x = testing::as_dtype(testing::random_floats(static_cast<std::size_t>(tokens * kIn), random),
                            dtype);
    }
    want = operators_deltas(task, x.data(), region());
    place(kWholeAddressSpace);
  }

  Region region() const { return {weights.data(), std::ssize(weights)}; }

  // Offsets from that region's base.
  void place(const Region& to) {
    const std::int64_t offset =
        reinterpret_cast<std::intptr_t>(weights.data()) - reinterpret_cast<std::intptr_t>(to.base);
    for (TaskProjection& p : task.projections) {
      p.a_offset += offset;
      p.b_offset += offset;
    }
  }
};

inline bool has_deltas(const Channel& channel, Submission submission,
                       const std::vector<std::byte>& want) {
  return std::equal(want.begin(), want.end(), channel.deltas(submission));
}

// Submits until there is room.
inline Submission submit(Channel& channel, const Task& task, const void* x,
                         std::shared_ptr<const void> keep = nullptr) {
  std::optional<Submission> submission;
  EXPECT_TRUE(eventually([&] {
    submission = channel.submit(task, x, task.in, keep);
    return submission.has_value();
  }));
  return submission.value();
}

inline const std::vector<Region> kHere{kWholeAddressSpace};

}  // namespace toppings::assist
