// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>

namespace toppings::sim {

// A set of numbers that lie close together: bit maps of 4096 each.
class IndexSet {
 public:
  void insert(std::uintptr_t index);
  bool contains(std::uintptr_t index) const;
  std::int64_t size() const;

 private:
  using Page = std::array<std::uint64_t, 64>;
  Page* page(std::uintptr_t index) const;

  std::unordered_map<std::uintptr_t, Page> pages_;
  mutable std::uintptr_t last_number_ = 0;
  mutable Page* last_ = nullptr;
};

}  // namespace toppings::sim
