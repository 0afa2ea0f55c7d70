// SPDX-License-Identifier: Apache-2.0
#include <toppings/adapter_layout.h>

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "check.h"

namespace toppings {
namespace {

[[noreturn]] void fail_too_large(int layer) {
  fail(Status::invalid_argument, "adapter", "an image below 2^63 bytes",
       "more in layer " + std::to_string(layer));
}

// rank * (in + out) elements as bytes, rounded up to whole block granules; -1 beyond 63 bits.
std::int64_t block_bytes(std::int64_t rank, const Projection& projection, DType dtype) {
  const std::int64_t row_bytes =
      (projection.in + projection.out) * static_cast<std::int64_t>(size_of(dtype));
  std::int64_t bytes = 0;
  if (__builtin_mul_overflow(rank, row_bytes, &bytes)) return -1;
  if (__builtin_add_overflow(bytes, kBlockAlignment - 1, &bytes)) return -1;
  return bytes / kBlockAlignment * kBlockAlignment;
}

}  // namespace

AdapterLayout::AdapterLayout(std::shared_ptr<const ModelShape> shape, DType dtype,
                             const std::vector<std::vector<std::int64_t>>& ranks)
    : shape_(std::move(shape)), dtype_(dtype) {
  if (shape_ == nullptr) fail(Status::invalid_argument, "shape", "a model shape", "null");
  if (ranks.size() != static_cast<std::size_t>(shape_->num_layers())) {
    fail(Status::mismatch, "ranks", std::to_string(shape_->num_layers()) + " layers",
         std::to_string(ranks.size()));
  }
  blocks_.reserve(static_cast<std::size_t>(shape_->num_rows()));
  layer_offsets_.reserve(ranks.size() + 1);
  layer_offsets_.push_back(0);
  for (int layer = 0; layer < shape_->num_layers(); ++layer) {
    add_layer(layer, ranks[static_cast<std::size_t>(layer)]);
  }
  if (max_rank_ == 0) {
    fail(Status::invalid_argument, "ranks", "at least one above 0", "none");
  }
}

void AdapterLayout::add_layer(int layer, const std::vector<std::int64_t>& ranks) {
  const std::vector<Projection>& projections = shape_->layer(layer);
  if (ranks.size() != projections.size()) {
    fail(Status::mismatch, "ranks of layer " + std::to_string(layer),
         std::to_string(projections.size()) + " projections", std::to_string(ranks.size()));
  }
  std::int64_t layer_bytes = 0;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const std::int64_t rank = ranks[i];
    if (rank < 0 || rank > std::numeric_limits<std::int32_t>::max()) {
      fail(Status::invalid_argument,
           "rank of layer " + std::to_string(layer) + ", '" + projections[i].name + "'",
           "0 <= rank < 2^31", std::to_string(rank));
    }
    const std::int64_t bytes = block_bytes(rank, projections[i], dtype_);
    if (bytes < 0) fail_too_large(layer);
    const std::int64_t a_offset = layer_bytes / static_cast<std::int64_t>(size_of(dtype_));
    blocks_.push_back(
        {.rank = rank, .a_offset = a_offset, .b_offset = a_offset + rank * projections[i].in});
    if (__builtin_add_overflow(layer_bytes, bytes, &layer_bytes)) fail_too_large(layer);
    max_rank_ = std::max(max_rank_, static_cast<int>(rank));
  }
  std::int64_t end = 0;
  if (__builtin_add_overflow(layer_offsets_.back(), layer_bytes, &end)) fail_too_large(layer);
  layer_offsets_.push_back(end);
  max_layer_bytes_ = std::max(max_layer_bytes_, layer_bytes);
}

const Block& AdapterLayout::block(int layer, int projection) const {
  return blocks_[static_cast<std::size_t>(shape_->row(layer, projection))];
}

std::int64_t AdapterLayout::layer_offset(int layer) const {
  check_index("layer", layer, shape_->num_layers());
  return layer_offsets_[static_cast<std::size_t>(layer)];
}

std::int64_t AdapterLayout::layer_bytes(int layer) const {
  check_index("layer", layer, shape_->num_layers());
  const auto i = static_cast<std::size_t>(layer);
  return layer_offsets_[i + 1] - layer_offsets_[i];
}

}  // namespace toppings
