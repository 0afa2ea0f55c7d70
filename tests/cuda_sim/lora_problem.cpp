// SPDX-License-Identifier: Apache-2.0
#include "lora_problem.h"

#include <toppings/lora_plan.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <sstream>

#include "cuda/ptx.cuh"

namespace toppings::sim {

std::string Case::text() const {
  std::ostringstream out;
  out << "seed " << seed << " T=" << tokens << " K=" << in << " N=";
  for (const auto width : widths) out << width << ' ';
  out << name_of(dtype) << ' ' << name_of(a_dtype) << ' ' << name_of(b_dtype) << " r=";
  for (const auto rank : ranks) out << rank << ' ';
  out << (absent ? "absent " : "") << (aligned ? "aligned " : "") << (planned ? "planned" : "");
  return out.str();
}

Numbers::Numbers(DType dtype, std::size_t count, bool aligned)
    : dtype_(dtype), count_(count), begin_(sizeof(Line)), lines_(count * size_of(dtype) / 64 + 3) {
  if (!aligned) begin_ -= size_of(dtype);
  std::memset(lines_.data(), 0xff, lines_.size() * sizeof(Line));
}

bool Numbers::same_memory(const Numbers& other) const {
  return lines_.size() == other.lines_.size() && begin_ == other.begin_ &&
         std::memcmp(lines_.data(), other.lines_.data(), lines_.size() * sizeof(Line)) == 0;
}

void Numbers::set(std::size_t i, double value) {
  const auto single = static_cast<float>(value);
  std::byte* to = data() + i * size_of(dtype_);
  if (dtype_ == DType::f32) {
    std::memcpy(to, &single, sizeof(single));
  } else {
    const std::uint16_t bits = dtype_ == DType::f16 ? cuda::from_float<cuda::f16>(single).bits
                                                    : cuda::from_float<cuda::bf16>(single).bits;
    std::memcpy(to, &bits, sizeof(bits));
  }
}

float Numbers::get(std::size_t i) const {
  const std::byte* from = data() + i * size_of(dtype_);
  if (dtype_ == DType::f32) {
    float value;
    std::memcpy(&value, from, sizeof(value));
    return value;
  }
  std::uint16_t bits;
  std::memcpy(&bits, from, sizeof(bits));
  return dtype_ == DType::f16 ? cuda::to_float(cuda::f16{bits}) : cuda::to_float(cuda::bf16{bits});
}

double tolerance(DType dtype) {
  return dtype == DType::f32 ? 1e-5 : dtype == DType::f16 ? 1e-3 : 5e-3;
}

Problem::Problem(const Case& c) : data(c), token_slots(c.token_slots) {
  std::mt19937_64 random(c.seed);
  std::normal_distribution<double> normal;
  const auto num_slots = static_cast<std::int32_t>(c.ranks.size());
  if (token_slots.empty()) {
    std::uniform_int_distribution<std::int32_t> any(-2, num_slots);
    for (std::int64_t t = 0; t < c.tokens; ++t) token_slots.push_back(any(random));
  }
  columns_ = std::accumulate(c.widths.begin(), c.widths.end(), std::int64_t{0});
  // A row's stride is of 8 numbers where rows are aligned, else odd.
  x_stride_ = c.aligned ? (c.in + 23) / 8 * 8 : (c.in + 3) | 1;
  y_stride_ = c.aligned ? (columns_ + 23) / 8 * 8 : (columns_ + 3) | 1;
  x_ = Numbers(c.dtype, static_cast<std::size_t>(c.tokens * x_stride_), c.aligned);
  y_before_ = Numbers(c.dtype, static_cast<std::size_t>(c.tokens * y_stride_), c.aligned);
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    for (std::int64_t k = 0; k < c.in; ++k) x_.set(t * x_stride_ + k, normal(random));
    for (std::int64_t n = 0; n < columns_; ++n) {
      y_before_.set(t * y_stride_ + n, c.y_scale * normal(random));
    }
  }
  make_weights(random());
  if (data.max_rank == 0) data.max_rank = *std::max_element(c.ranks.begin(), c.ranks.end());
  v_rank_ = data.max_rank;
  make_expected();
  if (c.planned) {
    std::vector<std::int32_t> valid = token_slots;
    for (auto& slot : valid) slot = has_adapter(slot) ? slot : -1;
    plan_.resize(static_cast<std::size_t>(2 * c.tokens + 2));
    lora_plan(valid.data(), c.tokens, num_slots, plan_.data());
  }
}

std::int64_t Problem::rank(std::int64_t projection, std::int32_t slot) const {
  const bool absent = data.absent && (projection + slot) % 2 == 1;
  return absent ? 0 : data.ranks[static_cast<std::size_t>(slot)];
}

bool Problem::has_adapter(std::int32_t slot) const {
  return slot >= 0 && slot < static_cast<std::int32_t>(data.ranks.size());
}

void Problem::make_weights(std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  const auto num_slots = static_cast<std::int32_t>(data.ranks.size());
  const auto num_projections = static_cast<std::int64_t>(data.widths.size());
  std::int64_t a_size = 0, b_size = 0;
  std::uniform_int_distribution<std::int64_t> gap(1, 7);
  slots_.resize(static_cast<std::size_t>(num_projections * num_slots * 3));
  for (std::int64_t s = 0; s < num_projections; ++s) {
    for (std::int32_t slot = 0; slot < num_slots; ++slot) {
      a_size = data.aligned ? (a_size + 31) / 32 * 32 : a_size + gap(random);
      b_size = data.aligned ? (b_size + 31) / 32 * 32 : b_size + gap(random);
      std::int64_t* entry = &slots_[static_cast<std::size_t>((s * num_slots + slot) * 3)];
      entry[0] = a_size;
      entry[1] = b_size;
      entry[2] = rank(s, slot);
      a_size += entry[2] * data.in;
      b_size += entry[2] * data.widths[static_cast<std::size_t>(s)];
      scales_.push_back(static_cast<float>(normal(random)));
    }
  }
  // NaN between the blocks.
  a_ = Numbers(data.a_dtype, static_cast<std::size_t>(a_size), data.aligned);
  b_ = Numbers(data.b_dtype, static_cast<std::size_t>(b_size), data.aligned);
  for (std::size_t i = 0; i < slots_.size(); i += 3) {
    const std::int64_t width = data.widths[i / 3 / static_cast<std::size_t>(num_slots)];
    const auto r = static_cast<double>(std::max<std::int64_t>(slots_[i + 2], 1));
    for (std::int64_t j = 0; j < slots_[i + 2] * data.in; ++j) {
      a_.set(static_cast<std::size_t>(slots_[i] + j),
             normal(random) / std::sqrt(static_cast<double>(data.in)));
    }
    for (std::int64_t j = 0; j < slots_[i + 2] * width; ++j) {
      b_.set(static_cast<std::size_t>(slots_[i + 1] + j),
             normal(random) / std::sqrt(r) / data.v_scale);
    }
  }
}

void Problem::make_expected() {
  const auto num_slots = static_cast<std::int64_t>(data.ranks.size());
  const auto num_projections = static_cast<std::int64_t>(data.widths.size());
  want_v_.assign(static_cast<std::size_t>(num_projections * data.tokens * v_rank_), 0);
  want_y_.resize(static_cast<std::size_t>(data.tokens * columns_));
  v_given_ = Numbers(DType::f32, want_v_.size(), data.aligned);
  for (std::int64_t t = 0; t < data.tokens; ++t) {
    double* y = want_y_.data() + t * columns_;
    for (std::int64_t n = 0; n < columns_; ++n) {
      y[n] = y_before_.get(static_cast<std::size_t>(t * y_stride_ + n));
    }
    const std::int32_t slot = token_slots[static_cast<std::size_t>(t)];
    if (!has_adapter(slot)) continue;
    std::int64_t column = 0;
    for (std::int64_t s = 0; s < num_projections; ++s) {
      const std::int64_t width = data.widths[static_cast<std::size_t>(s)];
      const std::int64_t* entry = &slots_[static_cast<std::size_t>((s * num_slots + slot) * 3)];
      for (std::int64_t j = 0; j < entry[2]; ++j) {
        double v = 0;
        for (std::int64_t k = 0; k < data.in; ++k) {
          v += static_cast<double>(x_.get(static_cast<std::size_t>(t * x_stride_ + k))) *
               a_.get(static_cast<std::size_t>(entry[0] + j * data.in + k));
        }
        const auto at = static_cast<std::size_t>((s * data.tokens + t) * v_rank_ + j);
        want_v_[at] = v;
        v *= data.v_scale;
        v_given_.set(at, v);
        v *= scales_[static_cast<std::size_t>(s * num_slots + slot)];
        for (std::int64_t n = 0; n < width; ++n) {
          y[column + n] += v * b_.get(static_cast<std::size_t>(entry[1] + j * width + n));
        }
      }
      column += width;
    }
  }
}

std::vector<std::vector<float>> Problem::rows(Operator op) const {
  std::vector<std::vector<float>> rows(static_cast<std::size_t>(data.tokens));
  const auto num_projections = static_cast<std::int64_t>(data.widths.size());
  for (std::int64_t t = 0; t < data.tokens; ++t) {
    auto& row = rows[static_cast<std::size_t>(t)];
    if (op == Operator::shrink) {
      for (std::int64_t s = 0; s < num_projections; ++s) {
        for (std::int64_t j = 0; j < v_rank_; ++j) {
          row.push_back(v_.get(static_cast<std::size_t>((s * data.tokens + t) * v_rank_ + j)));
        }
      }
    } else {
      for (std::int64_t n = 0; n < columns_; ++n) {
        row.push_back(y_.get(static_cast<std::size_t>(t * y_stride_ + n)));
      }
    }
  }
  return rows;
}

double Problem::error(Operator op) const {
  double difference = 0, norm = 0;
  const auto got = rows(op);
  const auto add_one = [&](double one, double want) {
    difference += (one - want) * (one - want);
    norm += want * want;
  };
  for (std::int64_t t = 0; t < data.tokens; ++t) {
    const auto& row = got[static_cast<std::size_t>(t)];
    for (std::int64_t i = 0; i < static_cast<std::int64_t>(row.size()); ++i) {
      const double want = op == Operator::shrink
                              ? want_v_[static_cast<std::size_t>(
                                    (i / v_rank_ * data.tokens + t) * v_rank_ + i % v_rank_)]
                              : want_y_[static_cast<std::size_t>(t * columns_ + i)];
      add_one(row[static_cast<std::size_t>(i)], want);
    }
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

bool Problem::rest_is_untouched(Operator op) const {
  Numbers got = op == Operator::shrink ? v_ : y_;
  Numbers before =
      op == Operator::shrink ? Numbers(DType::f32, want_v_.size(), data.aligned) : y_before_;
  if (op == Operator::shrink) std::memset(before.data(), 0, before.bytes());
  const auto num_projections = static_cast<std::int64_t>(data.widths.size());
  for (std::int64_t t = 0; t < data.tokens; ++t) {
    const std::int32_t slot = token_slots[static_cast<std::size_t>(t)];
    if (!has_adapter(slot)) continue;
    std::int64_t column = 0;
    for (std::int64_t s = 0; s < num_projections; ++s) {
      const std::int64_t r = rank(s, slot), width = data.widths[static_cast<std::size_t>(s)];
      for (std::int64_t i = 0; i < (op == Operator::shrink ? r : r == 0 ? 0 : width); ++i) {
        const auto at =
            static_cast<std::size_t>(op == Operator::shrink ? (s * data.tokens + t) * v_rank_ + i
                                                            : t * y_stride_ + column + i);
        got.set(at, 0);
        before.set(at, 0);
      }
      column += width;
    }
  }
  return got.same_memory(before);
}

Problem Problem::permuted(const std::vector<std::int32_t>& order) const {
  Problem other = *this;
  for (std::size_t i = 0; i < order.size(); ++i) {
    const auto from = static_cast<std::size_t>(order[i]);
    other.token_slots[i] = token_slots[from];
    for (std::int64_t k = 0; k < data.in; ++k) {
      other.x_.set(i * x_stride_ + k, x_.get(from * x_stride_ + k));
    }
    for (std::int64_t n = 0; n < columns_; ++n) {
      other.y_before_.set(i * y_stride_ + n, y_before_.get(from * y_stride_ + n));
    }
  }
  other.make_expected();
  return other;
}

}  // namespace toppings::sim
