// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include <toppings/dtype.h>
#include <toppings/export.h>
#include <toppings/model_shape.h>

namespace toppings {

// Every block starts on a multiple of this many bytes, relative to its layer block and absolutely.
inline constexpr std::int64_t kBlockAlignment = 64;

// One projection of one layer of one adapter: A [rank, in] then B [rank, out], contiguous. rank 0: absent.
struct Block {
  std::int64_t rank;
  std::int64_t a_offset;  // elements from the start of the layer block
  std::int64_t b_offset;  // = a_offset + rank * in
};

// Where the blocks of one adapter lie. The same offsets hold in an image, in the arena and in a packed file.
class TOPPINGS_EXPORT AdapterLayout {
 public:
  // ranks[layer][projection]. Throws mismatch when its shape isn't the model's, invalid_argument for a rank < 0 or when
  // every rank is 0.
  AdapterLayout(std::shared_ptr<const ModelShape> shape, DType dtype, const std::vector<std::vector<std::int64_t>>& ranks);

  const std::shared_ptr<const ModelShape>& shape() const noexcept { return shape_; }
  DType dtype() const noexcept { return dtype_; }
  int max_rank() const noexcept { return max_rank_; }

  const Block& block(int layer, int projection) const;
  std::int64_t layer_offset(int layer) const;         // bytes from the start of the image
  std::int64_t layer_bytes(int layer) const;          // a multiple of kBlockAlignment; 0 when nothing is targeted
  std::int64_t max_layer_bytes() const noexcept;      // what the adapter reserves in every layer of an arena
  std::int64_t bytes() const noexcept;                // of the whole image

 private:
  std::shared_ptr<const ModelShape> shape_;
  DType dtype_;
  int max_rank_ = 0;
  std::vector<Block> blocks_;                 // [shape.num_rows()]
  std::vector<std::int64_t> layer_offsets_;   // [num_layers + 1], bytes
};

}  // namespace toppings
