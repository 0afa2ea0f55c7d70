// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/image.h>

#include <cstddef>
#include <span>
#include <vector>

namespace toppings {

// A builder filled with bytes that are laid out already, instead of block by block.
class ImageFill {
 public:
  // [layout().bytes()], zero at first.
  static std::span<std::byte> bytes(ImageBuilder& builder);

  // Every block counts as set. scales: [shape.num_rows()].
  static void finish(ImageBuilder& builder, std::vector<float> scales);
};

}  // namespace toppings
