// SPDX-License-Identifier: Apache-2.0
#include "cpu/items.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace toppings::cpu {
namespace {

// A block of a longer segment has at least so many tokens, so that filling panels costs little
// beside using them.
constexpr std::int64_t kMinBlock = 32;

// Items per thread, where there is a choice: a thread that is late then doesn't hold up the others.
constexpr double kItemsPerThread = 2;

// What one item should cost.
double target_of(double cost, int threads) {
  return threads == 1 ? std::numeric_limits<double>::infinity()
                      : cost / (threads * kItemsPerThread);
}

// push(first, count) for blocks of nearly equal size of a product's tokens, each at most `most`.
template <class Push>
void for_blocks(const Product& product, std::int64_t most, Push push) {
  const std::int64_t blocks = (product.num_tokens + most - 1) / most;
  std::int64_t first = 0;
  for (std::int64_t block = 1; block <= blocks; ++block) {
    const std::int64_t end = product.num_tokens * block / blocks;
    push(first, end - first);
    first = end;
  }
}

// Each product is split along `extent` (rank rows or columns), at multiples of `tile`, into parts
// of about the target, and where one tile still costs more than a thread's share of everything,
// along the tokens. unit_cost: of one token through one rank row or column.
template <class Extent, class UnitCost>
void make_items(const std::vector<Product>& products, double cost, int threads, std::int64_t tile,
                Extent extent, UnitCost unit_cost, std::vector<Item>& items) {
  items.clear();
  const double target = target_of(cost, threads), share = cost / threads;
  for (const Product& product : products) {
    const std::int64_t end = extent(product);
    const double all_tokens = static_cast<double>(product.num_tokens) * unit_cost(product);
    const auto fitting =
        static_cast<std::int64_t>(std::min(target / all_tokens, static_cast<double>(end)));
    const std::int64_t size = std::max<std::int64_t>(1, (fitting + tile - 1) / tile) * tile;
    const double parts =
        std::max(1.0, std::ceil(all_tokens * static_cast<double>(std::min(size, end)) / share));
    const auto most =
        static_cast<std::int64_t>(std::ceil(static_cast<double>(product.num_tokens) / parts));
    for_blocks(product, std::min(kMaxBlock, std::max(most, kMinBlock)),
               [&](std::int64_t first, std::int64_t count) {
                 for (std::int64_t begin = 0; begin < end; begin += size) {
                   items.push_back({&product, first, count, begin, std::min(begin + size, end)});
                 }
               });
  }
}

}  // namespace

double shrink_cost(const std::vector<Product>& products, std::int64_t in) {
  double cost = 0;
  for (const Product& p : products) cost += static_cast<double>(p.num_tokens) * p.rank * in;
  return cost;
}

double expand_cost(const std::vector<Product>& products) {
  double cost = 0;
  for (const Product& p : products) cost += static_cast<double>(p.num_tokens) * p.rank * p.width;
  return cost;
}

bool make_fused_items(const std::vector<Product>& products, std::int64_t in, int threads,
                      std::vector<Item>& items) {
  items.clear();
  const double target = target_of(shrink_cost(products, in) + expand_cost(products), threads);
  for (const Product& product : products) {
    const double token =
        static_cast<double>(product.rank) * static_cast<double>(in + product.width);
    const auto least = static_cast<double>(std::min(product.num_tokens, kMinBlock));
    if (least * token > target) {
      items.clear();
      return false;
    }
    const double most = std::clamp(target / token, least, static_cast<double>(kMaxBlock));
    for_blocks(product, static_cast<std::int64_t>(most),
               [&](std::int64_t first, std::int64_t count) {
                 items.push_back({&product, first, count, 0, 0});
               });
  }
  return true;
}

void make_shrink_items(const std::vector<Product>& products, std::int64_t in, int threads,
                       const Kernels& kernels, std::vector<Item>& items) {
  make_items(
      products, shrink_cost(products, in), threads, kernels.rank_tile,
      [](const Product& p) { return p.rank; },
      [in](const Product&) { return static_cast<double>(in); }, items);
}

void make_expand_items(const std::vector<Product>& products, int threads, const Kernels& kernels,
                       std::vector<Item>& items) {
  make_items(
      products, expand_cost(products), threads, kernels.column_tile,
      [](const Product& p) { return p.width; },
      [](const Product& p) { return static_cast<double>(p.rank); }, items);
}

}  // namespace toppings::cpu
