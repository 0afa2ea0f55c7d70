// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/image.h>
#include <toppings/lora_args.h>
#include <toppings/slot_table.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

// What an engine computes for the tokens of one prompt, but for the base model: every layer reads
// the same random activations, and the base model's own results are zeros. All tokens have one
// adapter.
class Prefill {
 public:
  Prefill(std::shared_ptr<toppings::SlotTable> table, const toppings::Image& adapter, int slot,
          std::int64_t tokens);

  // The layer is published in the slot table.
  void compute(int layer);

  // Compares the results of the first layer, or of the one that was computed last, with a plain
  // computation in double precision on the adapter's image. Returns the largest error as a multiple
  // of what rounding alone can cause: above 1 something is wrong.
  double largest_error(const toppings::Image& adapter, int layer) const;

 private:
  // Projections of one layer that read the same input: one call of the operator.
  struct Site {
    int first;  // projection
    std::int64_t in;
    std::vector<std::int64_t> widths;
    std::int64_t column;  // where its results begin in a row of y
  };

  void add_sites(int layer);
  std::vector<std::byte>& y(int layer) { return layer == 0 ? y_first_ : y_; }

  std::shared_ptr<toppings::SlotTable> table_;
  std::shared_ptr<const toppings::ModelShape> shape_;
  toppings::DType dtype_;
  std::int64_t tokens_;
  std::int64_t x_width_ = 1;
  std::int64_t y_width_ = 1;
  std::vector<std::vector<Site>> sites_;   // [num_layers]
  std::vector<std::int32_t> token_slots_;  // [tokens]
  std::vector<std::int32_t> plan_;
  std::vector<std::byte> x_;            // [tokens, x_width]
  std::vector<std::byte> y_first_, y_;  // [tokens, y_width]: of layer 0, and of the others
};
