// SPDX-License-Identifier: Apache-2.0
#include <toppings/image.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "check.h"
#include "image/transpose.h"
#include "store/host_buffer.h"

namespace toppings {
namespace {

// Rows of B that are cast and transposed at a time, as bytes of the destination: half an L1 cache.
constexpr std::size_t kPanelBytes = 16 * 1024;

// dst [cols, rows] of dst_dtype = transpose of src [rows, cols] of src_dtype. T: an unsigned
// integer of dst_dtype's size.
template <class T>
void cast_transposed(T* dst, DType dst_dtype, const std::byte* src, DType src_dtype,
                     std::size_t rows, std::size_t cols) {
  const std::size_t row_bytes = cols * sizeof(T);
  // A multiple of the tile; at very large ranks a panel of one tile exceeds kPanelBytes.
  const std::size_t panel_rows =
      std::max(kPanelBytes / row_bytes / kTransposeTile, std::size_t{1}) * kTransposeTile;
  std::vector<T> cast_panel(dst_dtype == src_dtype ? 0 : std::min(panel_rows, rows) * cols);
  for (std::size_t row = 0; row < rows; row += panel_rows) {
    const std::size_t count = std::min(panel_rows, rows - row);
    const std::byte* panel = src + row * cols * size_of(src_dtype);
    if (dst_dtype == src_dtype) {
      transpose_panel(dst + row, rows, reinterpret_cast<const T*>(panel), count, cols);
    } else {
      convert(cast_panel.data(), dst_dtype, panel, src_dtype, count * cols);
      transpose_panel(dst + row, rows, cast_panel.data(), count, cols);
    }
  }
}

void check_pointer(const std::string& what, const void* data, DType dtype) {
  if (data != nullptr && reinterpret_cast<std::uintptr_t>(data) % size_of(dtype) == 0) return;
  fail(Status::invalid_argument, what,
       "a pointer aligned to " + std::to_string(size_of(dtype)) + " bytes",
       data == nullptr ? "null" : "one that is not");
}

}  // namespace

Image::Image(std::string digest, AdapterLayout layout, std::vector<float> scales,
             std::unique_ptr<HostBuffer> buffer)
    : digest_(std::move(digest)),
      layout_(std::move(layout)),
      scales_(std::move(scales)),
      buffer_(std::move(buffer)) {}

Image::~Image() = default;

float Image::scale(int layer, int projection) const {
  return scales_[static_cast<std::size_t>(layout_.shape()->row(layer, projection))];
}

const std::byte* Image::layer_data(int layer) const {
  return buffer_->data() + layout_.layer_offset(layer);
}

ImageBuilder::ImageBuilder(std::string digest, AdapterLayout layout,
                           std::unique_ptr<HostBuffer> buffer)
    : digest_(std::move(digest)),
      layout_(std::move(layout)),
      scales_(static_cast<std::size_t>(layout_.shape()->num_rows())),
      is_set_(scales_.size()),
      buffer_(std::move(buffer)) {}

ImageBuilder::ImageBuilder(ImageBuilder&&) noexcept = default;
ImageBuilder& ImageBuilder::operator=(ImageBuilder&&) noexcept = default;
ImageBuilder::~ImageBuilder() = default;

void ImageBuilder::set(int layer, int projection, const void* a, const void* b, DType src,
                       float scale) {
  if (buffer_ == nullptr) {
    fail(Status::invalid_argument, "builder", "one that isn't finished", "an empty one");
  }
  const Block& block = layout_.block(layer, projection);
  const Projection& shape = layout_.shape()->layer(layer)[static_cast<std::size_t>(projection)];
  const auto row = static_cast<std::size_t>(layout_.shape()->row(layer, projection));
  const std::string where = "layer " + std::to_string(layer) + ", '" + shape.name + "'";
  if (block.rank == 0) fail(Status::invalid_argument, where, "no block (rank 0)", "one");
  if (is_set_[row]) fail(Status::invalid_argument, where, "to be set once", "a second block");
  if (!std::isfinite(scale)) {
    fail(Status::invalid_argument, where + ", scale", "a finite number", std::to_string(scale));
  }
  check_pointer(where + ", a", a, src);
  check_pointer(where + ", b", b, src);

  const DType dtype = layout_.dtype();
  const auto rank = static_cast<std::size_t>(block.rank);
  const auto in = static_cast<std::size_t>(shape.in);
  const auto out = static_cast<std::size_t>(shape.out);
  std::byte* layer_data = buffer_->data() + layout_.layer_offset(layer);
  std::byte* a_dst = layer_data + static_cast<std::size_t>(block.a_offset) * size_of(dtype);
  std::byte* b_dst = layer_data + static_cast<std::size_t>(block.b_offset) * size_of(dtype);
  const auto* b_src = static_cast<const std::byte*>(b);
  try {
    convert(a_dst, dtype, a, src, rank * in);
    if (size_of(dtype) == 2) {
      cast_transposed(reinterpret_cast<std::uint16_t*>(b_dst), dtype, b_src, src, out, rank);
    } else {
      cast_transposed(reinterpret_cast<std::uint32_t*>(b_dst), dtype, b_src, src, out, rank);
    }
  } catch (const Error& error) {
    throw Error(error.status(), where + ": " + error.what());
  }
  scales_[row] = scale;
  is_set_[row] = true;
}

std::shared_ptr<const Image> ImageBuilder::finish() && {
  if (buffer_ == nullptr) {
    fail(Status::invalid_argument, "builder", "one that isn't finished", "an empty one");
  }
  const ModelShape& shape = *layout_.shape();
  for (int layer = 0; layer < shape.num_layers(); ++layer) {
    const std::vector<Projection>& projections = shape.layer(layer);
    for (int i = 0; i < static_cast<int>(projections.size()); ++i) {
      if (layout_.block(layer, i).rank == 0) continue;
      if (is_set_[static_cast<std::size_t>(shape.row(layer, i))]) continue;
      fail(Status::invalid_argument,
           "layer " + std::to_string(layer) + ", '" +
               projections[static_cast<std::size_t>(i)].name + "'",
           "a block", "none");
    }
  }
  return std::shared_ptr<const Image>(
      new Image(std::move(digest_), std::move(layout_), std::move(scales_), std::move(buffer_)));
}

}  // namespace toppings
