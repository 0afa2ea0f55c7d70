// SPDX-License-Identifier: Apache-2.0
#include <toppings/model_shape.h>

#include <limits>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "check.h"

namespace toppings {
namespace {

void check_dimension(const std::string& what, std::int64_t value) {
  if (value >= 1 && value <= std::numeric_limits<std::int32_t>::max()) return;
  fail(Status::invalid_argument, what, "1 <= width < 2^31", std::to_string(value));
}

void check_layer(std::size_t layer, const std::vector<Projection>& projections) {
  std::unordered_set<std::string_view> names;
  for (const Projection& projection : projections) {
    const std::string where = "layer " + std::to_string(layer) + ", '" + projection.name + "'";
    if (projection.name.empty()) {
      fail(Status::invalid_argument, where, "a projection's name", "an empty one");
    }
    check_dimension(where + ", in", projection.in);
    check_dimension(where + ", out", projection.out);
    if (!names.insert(projection.name).second) {
      fail(Status::invalid_argument, where, "names unique within the layer", "this one twice");
    }
  }
}

}  // namespace

ModelShape::ModelShape(std::vector<std::vector<Projection>> layers) : layers_(std::move(layers)) {
  if (layers_.empty()) fail(Status::invalid_argument, "layers", "at least 1", "0");
  first_row_.reserve(layers_.size() + 1);
  first_row_.push_back(0);
  for (std::size_t layer = 0; layer < layers_.size(); ++layer) {
    check_layer(layer, layers_[layer]);
    first_row_.push_back(first_row_.back() + static_cast<int>(layers_[layer].size()));
  }
}

const std::vector<Projection>& ModelShape::layer(int layer) const {
  check_index("layer", layer, num_layers());
  return layers_[static_cast<std::size_t>(layer)];
}

int ModelShape::row(int layer, int projection) const {
  check_index("projection", projection, static_cast<std::int64_t>(this->layer(layer).size()));
  return first_row_[static_cast<std::size_t>(layer)] + projection;
}

}  // namespace toppings
