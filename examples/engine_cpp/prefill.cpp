// SPDX-License-Identifier: Apache-2.0
#include "prefill.h"

#include <toppings/dtype.h>
#include <toppings/lora.h>
#include <toppings/lora_plan.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <span>
#include <string_view>
#include <utility>

namespace {

// An engine knows which of its linear layers read the same input. Here the names of Llama's tell.
std::string_view input_of(const toppings::Projection& projection) {
  const std::string_view name = projection.name;
  constexpr std::array<std::pair<std::string_view, std::string_view>, 5> kInputs = {
      {{"q_proj", "attention"},
       {"k_proj", "attention"},
       {"v_proj", "attention"},
       {"gate_proj", "mlp"},
       {"up_proj", "mlp"}}};
  for (const auto& [ending, input] : kInputs) {
    if (name.ends_with(ending)) return input;
  }
  return name;  // a site of its own
}

std::vector<float> to_float(const std::byte* data, toppings::DType dtype, std::size_t count) {
  std::vector<float> values(count);
  toppings::convert(values.data(), toppings::DType::f32, data, dtype, count);
  return values;
}

// How far rounding once moves a number: by this part of it, and by this much where it is tiny.
struct Rounding {
  double relative, absolute;
};

Rounding rounding_of(toppings::DType dtype) {
  switch (dtype) {
    case toppings::DType::f32:
      return {0x1p-24, 0x1p-126};
    case toppings::DType::f16:
      return {0x1p-11, 0x1p-25};
    case toppings::DType::bf16:
      return {0x1p-8, 0x1p-126};
  }
  return {};
}

struct Expected {
  double y = 0;
  double products = 0;  // sum of |scale v_j b_jn|: what rounding v could move
  double terms = 0;     // sum of |scale x_k a_jk b_jn|: what summing in fp32 could move
};

// One token and one projection: y [out] = scale (x A^T) B, in double precision.
std::vector<Expected> compute_plainly(std::span<const float> x, std::span<const float> a,
                                      std::span<const float> b, std::size_t out, double scale) {
  std::vector<Expected> row(out);
  for (std::size_t j = 0; j < b.size() / out; ++j) {
    double v = 0;
    double v_terms = 0;
    for (std::size_t k = 0; k < x.size(); ++k) {
      const double term = double{x[k]} * double{a[j * x.size() + k]};
      v += term;
      v_terms += std::abs(term);
    }
    for (std::size_t n = 0; n < out; ++n) {
      const double weight = scale * double{b[j * out + n]};
      row[n].y += v * weight;
      row[n].products += std::abs(v * weight);
      row[n].terms += std::abs(v_terms * weight);
    }
  }
  return row;
}

}  // namespace

Prefill::Prefill(std::shared_ptr<toppings::SlotTable> table, const toppings::Image& adapter,
                 int slot, std::int64_t tokens)
    : table_(std::move(table)),
      shape_(adapter.layout().shape()),
      dtype_(table_->arena()->dtype()),
      tokens_(tokens),
      token_slots_(static_cast<std::size_t>(tokens), slot) {
  for (int layer = 0; layer < shape_->num_layers(); ++layer) add_sites(layer);

  plan_.resize(static_cast<std::size_t>(toppings::lora_plan_size(tokens, table_->num_slots())));
  toppings::lora_plan(token_slots_.data(), tokens, table_->num_slots(), plan_.data());

  std::minstd_rand random;
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<float> x(static_cast<std::size_t>(tokens * x_width_));
  for (float& value : x) value = uniform(random);
  x_.resize(x.size() * toppings::size_of(dtype_));
  toppings::convert(x_.data(), dtype_, x.data(), toppings::DType::f32, x.size());
  y_.resize(static_cast<std::size_t>(tokens * y_width_) * toppings::size_of(dtype_));
  y_first_ = y_;
}

void Prefill::add_sites(int layer) {
  const std::vector<toppings::Projection>& projections = shape_->layer(layer);
  std::vector<Site>& sites = sites_.emplace_back();
  std::int64_t column = 0;
  for (std::size_t i = 0; i < projections.size(); ++i) {
    const toppings::Projection& projection = projections[i];
    if (i == 0 || input_of(projection) != input_of(projections[i - 1])) {
      sites.push_back({static_cast<int>(i), projection.in, {}, column});
    }
    sites.back().widths.push_back(projection.out);
    column += projection.out;
    x_width_ = std::max(x_width_, projection.in);
  }
  y_width_ = std::max(y_width_, column);
}

void Prefill::compute(int layer) {
  std::ranges::fill(y(layer), std::byte{0});
  const std::byte* weights = table_->arena()->layer(layer);
  const std::int64_t num_weights =
      table_->arena()->bytes_per_layer() / static_cast<std::int64_t>(toppings::size_of(dtype_));
  for (const Site& site : sites_[static_cast<std::size_t>(layer)]) {
    const std::ptrdiff_t cell =
        static_cast<std::ptrdiff_t>(shape_->row(layer, site.first)) * table_->num_slots();
    toppings::lora_forward({
        .batch = {.tokens = tokens_,
                  .num_slots = table_->num_slots(),
                  .num_projections = static_cast<std::int64_t>(site.widths.size()),
                  .slots = table_->slots().data() + cell * 3,
                  .scales = table_->scales().data() + cell,
                  .token_slots = token_slots_.data(),
                  .plan = plan_.data()},
        .dtype = dtype_,
        .a_dtype = dtype_,
        .b_dtype = dtype_,
        .in = site.in,
        .widths = site.widths,
        .x = x_.data(),
        .x_stride = x_width_,
        .y = y(layer).data() + static_cast<std::size_t>(site.column) * toppings::size_of(dtype_),
        .y_stride = y_width_,
        .a = weights,
        .a_size = num_weights,
        .b = weights,
        .b_size = num_weights,
    });
  }
}

double Prefill::largest_error(const toppings::Image& adapter, int layer) const {
  const toppings::AdapterLayout& layout = adapter.layout();
  const Rounding rounding = rounding_of(dtype_);
  const auto x_width = static_cast<std::size_t>(x_width_);
  const auto y_width = static_cast<std::size_t>(y_width_);
  const std::vector<float> x = to_float(x_.data(), dtype_, token_slots_.size() * x_width);
  const std::vector<float> y =
      to_float((layer == 0 ? y_first_ : y_).data(), dtype_, token_slots_.size() * y_width);
  double largest = 0;
  std::size_t column = 0;
  for (int i = 0; i < static_cast<int>(shape_->layer(layer).size()); ++i) {
    const toppings::Projection& projection = shape_->layer(layer)[static_cast<std::size_t>(i)];
    const auto in = static_cast<std::size_t>(projection.in);
    const auto out = static_cast<std::size_t>(projection.out);
    const toppings::Block block = layout.block(layer, i);
    const auto rank = static_cast<std::size_t>(block.rank);
    std::vector<float> a, b;
    if (rank > 0) {
      const std::byte* data = adapter.layer_data(layer);
      const std::size_t size = toppings::size_of(dtype_);
      a = to_float(data + static_cast<std::size_t>(block.a_offset) * size, dtype_, rank * in);
      b = to_float(data + static_cast<std::size_t>(block.b_offset) * size, dtype_, rank * out);
    }
    const double summing = static_cast<double>(in + rank + 2) * 0x1p-24;
    for (std::size_t t = 0; t < token_slots_.size(); ++t) {
      const std::vector<Expected> row = compute_plainly(std::span(x).subspan(t * x_width, in), a, b,
                                                        out, adapter.scale(layer, i));
      for (std::size_t n = 0; n < out; ++n) {
        const double bound = rounding.absolute + summing * row[n].terms +
                             rounding.relative * (std::abs(row[n].y) + row[n].products);
        const double error = std::abs(double{y[t * y_width + column + n]} - row[n].y) / bound;
        if (std::isnan(error)) return std::numeric_limits<double>::infinity();
        largest = std::max(largest, error);
      }
    }
    column += out;
  }
  return largest;
}
