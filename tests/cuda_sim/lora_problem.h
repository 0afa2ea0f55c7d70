// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <toppings/dtype.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "cuda/call.h"
#include "sim.h"

namespace toppings::sim {

// One call as data: it, with its seed, is printed when a test fails.
struct Case {
  std::uint64_t seed = 1;
  std::int64_t tokens = 1;
  std::int64_t in = 64;
  std::vector<std::int64_t> widths = {64};
  DType dtype = DType::bf16, a_dtype = DType::bf16, b_dtype = DType::bf16;
  std::vector<std::int64_t> ranks = {8};       // of each slot
  std::vector<std::int32_t> token_slots = {};  // empty: random, some of them -1 or out of range
  bool absent = false;                         // every other slot lacks every other projection
  bool aligned = false;                        // rows and blocks on 64 bytes, else at odd places
  double y_scale = 1;
  std::int64_t max_rank = 0;  // 0: the largest rank
  bool planned = false;       // the plan is given
  double v_scale = 1;         // of the v that expand is given; B is divided by it

  std::string text() const;
};

struct alignas(64) Line {
  std::byte bytes[64];
};

// Numbers of a dtype with NaN around them, at an odd place or on 64 bytes.
class Numbers {
 public:
  Numbers() = default;
  Numbers(DType dtype, std::size_t count, bool aligned);

  void set(std::size_t i, double value);
  float get(std::size_t i) const;
  std::byte* data() { return lines_.data()->bytes + begin_; }
  const std::byte* data() const { return lines_.data()->bytes + begin_; }
  std::size_t bytes() const { return count_ * size_of(dtype_); }
  // The numbers and what lies around them.
  bool same_memory(const Numbers& other) const;

 private:
  DType dtype_ = DType::f32;
  std::size_t count_ = 0, begin_ = 0;
  std::vector<Line> lines_;
};

enum class Operator : std::uint8_t { forward, shrink, expand };

// The inputs of a case, and what the operators should make of them, in float64.
class Problem {
 public:
  explicit Problem(const Case& data);

  // Runs an operator's launches on the simulator, as lora_cuda.cu does on a GPU. y or v begin
  // anew; the workspace is kept from run to run, NaN but for its counters.
  Report run(Operator op, const Options& options);
  Report run(const cuda::Call& call, const Options& options);

  // |got - want| / |want| of the last run, and whether everything around the result, and the rows
  // without an adapter, are as they were.
  double error(Operator op) const;
  bool rest_is_untouched(Operator op) const;
  bool counters_are_zero() const;

  // The last result, a row per token.
  std::vector<std::vector<float>> rows(Operator op) const;

  // The same inputs with the tokens in another order: token i becomes order[i].
  Problem permuted(const std::vector<std::int32_t>& order) const;

  cuda::Call call(Operator op);
  std::vector<Memory> memory();
  std::int64_t rank(std::int64_t projection, std::int32_t slot) const;
  bool has_adapter(std::int32_t slot) const;
  const cuda::Config& config() const { return config_; }
  const Numbers& y_before() const { return y_before_; }

  cuda::Gpu gpu{.multiprocessors = 3, .narrow_blocks = 2, .wide_blocks = 1};
  std::function<void(cuda::Config&)> adjust = [](cuda::Config&) {};  // of what was chosen
  Case data;
  std::vector<std::int32_t> token_slots;

 private:
  void make_weights(std::uint64_t seed);
  void make_expected();
  std::byte* new_workspace();

  std::int64_t x_stride_ = 0, y_stride_ = 0, columns_ = 0, v_rank_ = 0;
  Numbers x_, y_, y_before_, a_, b_, v_, v_given_;
  std::vector<std::int64_t> slots_;
  std::vector<float> scales_;
  std::vector<std::int32_t> plan_;
  std::vector<double> want_v_, want_y_;
  std::vector<Line> workspace_;
  cuda::Config config_{};
};

double tolerance(DType dtype);

// Runs it and expects the right numbers, nothing else touched and the counters at 0.
void expect_right(Problem& problem, Operator op, const Options& options);

// The same in all schedules and for all operators; true if nothing failed.
bool expect_right_everywhere(const Case& data, const std::function<void(cuda::Config&)>& adjust);

}  // namespace toppings::sim
