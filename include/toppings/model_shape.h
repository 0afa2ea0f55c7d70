// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>

#include <cstdint>
#include <string>
#include <vector>

namespace toppings {

// One linear layer of the base model: y [N] = W x [K].
struct Projection {
  std::string name;  // unique within its layer, e.g. "self_attn.q_proj"
  std::int64_t in;   // K
  std::int64_t out;  // N

  bool operator==(const Projection&) const = default;
};

// The projections of a base model that adapters may target, layer by layer. Projections that share
// their input (q, k, v; gate, up) stand next to each other, so that a site is a run of rows in the
// slot table. Immutable.
class TOPPINGS_EXPORT ModelShape {
 public:
  // Throws invalid_argument: no layers, a dimension < 1 or >= 2^31, a name empty or twice in one
  // layer. A layer may be empty.
  explicit ModelShape(std::vector<std::vector<Projection>> layers);

  int num_layers() const noexcept { return static_cast<int>(layers_.size()); }
  const std::vector<Projection>& layer(int layer) const;

  // Row of (layer, projection) in tables over all projections of the model, and the number of such
  // rows. Indices out of range throw invalid_argument, here and everywhere in the library.
  int row(int layer, int projection) const;
  int num_rows() const noexcept { return first_row_.back(); }

  bool operator==(const ModelShape& other) const { return layers_ == other.layers_; }

 private:
  std::vector<std::vector<Projection>> layers_;
  std::vector<int> first_row_;  // [num_layers + 1]
};

}  // namespace toppings
