// SPDX-License-Identifier: Apache-2.0
#include "image/image_fill.h"

#include <utility>

#include "store/host_buffer.h"

namespace toppings {

std::span<std::byte> ImageFill::bytes(ImageBuilder& builder) {
  return {builder.buffer_->data(), static_cast<std::size_t>(builder.layout_.bytes())};
}

void ImageFill::finish(ImageBuilder& builder, std::vector<float> scales) {
  builder.scales_ = std::move(scales);
  builder.is_set_.assign(builder.is_set_.size(), true);
}

}  // namespace toppings
