// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/products.h"

// How the work of a call is split over threads.
namespace toppings::cpu {

// What one thread takes at a time: some tokens of a product, and of its rank rows (shrink) or
// columns (expand) [begin, end).
struct Item {
  const Product* product;
  std::int64_t first_token, num_tokens, begin, end;
};

// Tokens of a segment that one thread takes together: at most so many that their v, and what they
// need of x and y at a time, stay in the second-level cache.
inline constexpr std::int64_t kMaxBlock = 192;

// Multiply-adds.
double shrink_cost(const std::vector<Product>& products, std::int64_t in);
double expand_cost(const std::vector<Product>& products);

// Both stages of some tokens, all rank rows and columns. False, and no items, where single ones
// would be too large for `threads` to share the work evenly.
bool make_fused_items(const std::vector<Product>& products, std::int64_t in, int threads,
                      std::vector<Item>& items);

// One stage of all products.
void make_shrink_items(const std::vector<Product>& products, std::int64_t in, int threads,
                       const Kernels& kernels, std::vector<Item>& items);
void make_expand_items(const std::vector<Product>& products, int threads, const Kernels& kernels,
                       std::vector<Item>& items);

}  // namespace toppings::cpu
