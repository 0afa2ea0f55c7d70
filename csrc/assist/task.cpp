// SPDX-License-Identifier: Apache-2.0
#include <toppings/assist/task.h>

#include <cstdint>
#include <limits>
#include <string>

#include "check.h"

namespace toppings::assist {

Task make_task(const Image& image, int layer, int first, int count, std::int64_t tokens,
               DType dtype, const Region& region, int region_index) {
  const AdapterLayout& layout = image.layout();
  const std::vector<Projection>& projections = layout.shape()->layer(layer);
  check_positive("count", count);
  check_index("first", first, std::ssize(projections));
  check_index("last projection", first + std::int64_t{count} - 1, std::ssize(projections));
  check_index("count - 1", count - 1, kMaxProjections);
  check_index("tokens", tokens, std::numeric_limits<std::int32_t>::max());

  const std::int64_t start = reinterpret_cast<std::intptr_t>(image.layer_data(layer)) -
                             reinterpret_cast<std::intptr_t>(region.base);
  if (start < 0 || start > region.bytes - layout.layer_bytes(layer)) {
    fail(Status::invalid_argument, "image", "one that lies in the region", "another");
  }
  Task task{.tokens = static_cast<std::int32_t>(tokens),
            .in = static_cast<std::int32_t>(projections[static_cast<std::size_t>(first)].in),
            .region = region_index,
            .num_projections = count,
            .dtype = dtype,
            .weight_dtype = layout.dtype(),
            .reserved = {},
            .projections = {}};
  const auto size = static_cast<std::int64_t>(size_of(layout.dtype()));
  for (int s = 0; s < count; ++s) {
    const Projection& projection = projections[static_cast<std::size_t>(first + s)];
    if (projection.in != task.in) {
      fail(Status::invalid_argument, projection.name + "'s input", std::to_string(task.in),
           std::to_string(projection.in));
    }
    const Block& block = layout.block(layer, first + s);
    const bool is_there = block.rank > 0;
    task.projections[static_cast<std::size_t>(s)] = {
        .a_offset = is_there ? start + block.a_offset * size : 0,
        .b_offset = is_there ? start + block.b_offset * size : 0,
        .rank = static_cast<std::int32_t>(block.rank),
        .out = static_cast<std::int32_t>(projection.out),
        .scale = image.scale(layer, first + s),
        .reserved = 0,
    };
  }
  return task;
}

}  // namespace toppings::assist
