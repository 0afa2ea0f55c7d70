// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/dtype.h>
#include <toppings/export.h>
#include <toppings/model_shape.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace toppings {

// Every block starts on a multiple of this many bytes, relative to its layer block and absolutely.
inline constexpr std::int64_t kBlockAlignment = 64;

// One projection of one layer of one adapter: A [rank, in] then B [rank, out], contiguous.
// rank 0: absent, and the offsets mean nothing.
struct Block {
  std::int64_t rank;
  std::int64_t a_offset;  // elements from the start of the layer block
  std::int64_t b_offset;  // = a_offset + rank * in

  bool operator==(const Block&) const = default;
};

// Where the blocks of one adapter lie. The same offsets hold in an image, in the arena and in a
// packed file. Immutable.
class TOPPINGS_EXPORT AdapterLayout {
 public:
  // ranks[layer][projection]. Throws mismatch when its shape isn't the model's, invalid_argument
  // for a rank < 0, when every rank is 0, or when the image would take 2^63 bytes or more.
  AdapterLayout(std::shared_ptr<const ModelShape> shape, DType dtype,
                const std::vector<std::vector<std::int64_t>>& ranks);

  const std::shared_ptr<const ModelShape>& shape() const noexcept { return shape_; }
  DType dtype() const noexcept { return dtype_; }
  int max_rank() const noexcept { return max_rank_; }

  const Block& block(int layer, int projection) const;

  // Bytes from the start of the image, and of the layer block: multiples of kBlockAlignment, the
  // latter 0 when nothing in the layer is targeted.
  std::int64_t layer_offset(int layer) const;
  std::int64_t layer_bytes(int layer) const;

  // What the adapter reserves in every layer of an arena.
  std::int64_t max_layer_bytes() const noexcept { return max_layer_bytes_; }
  std::int64_t bytes() const noexcept { return layer_offsets_.back(); }  // of the whole image

  // The same shape, dtype and ranks.
  bool operator==(const AdapterLayout& other) const {
    return (shape_ == other.shape_ || *shape_ == *other.shape_) && dtype_ == other.dtype_ &&
           blocks_ == other.blocks_;
  }

 private:
  void add_layer(int layer, const std::vector<std::int64_t>& ranks);

  std::shared_ptr<const ModelShape> shape_;
  DType dtype_;
  int max_rank_ = 0;
  std::int64_t max_layer_bytes_ = 0;
  std::vector<Block> blocks_;                // [shape.num_rows()]
  std::vector<std::int64_t> layer_offsets_;  // [num_layers + 1], bytes
};

}  // namespace toppings
