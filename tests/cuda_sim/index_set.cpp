// SPDX-License-Identifier: Apache-2.0
#include "index_set.h"

#include <bit>

namespace toppings::sim {
namespace {

constexpr std::uintptr_t kPage = 64 * 64;

std::uint64_t bit(std::uintptr_t index) { return std::uint64_t{1} << index % 64; }

}  // namespace

void IndexSet::insert(std::uintptr_t index) {
  Page* found = page(index);
  if (found == nullptr) {
    last_ = found = &pages_[index / kPage];  // a map's elements stay where they are
    last_number_ = index / kPage;
  }
  (*found)[index / 64 % 64] |= bit(index);
}

bool IndexSet::contains(std::uintptr_t index) const {
  const Page* found = page(index);
  return found != nullptr && ((*found)[index / 64 % 64] & bit(index)) != 0;
}

std::int64_t IndexSet::size() const {
  std::int64_t count = 0;
  for (const auto& [number, page] : pages_) {
    for (const std::uint64_t bits : page) count += std::popcount(bits);
  }
  return count;
}

IndexSet::Page* IndexSet::page(std::uintptr_t index) const {
  const std::uintptr_t number = index / kPage;
  if (last_ != nullptr && number == last_number_) return last_;
  const auto found = pages_.find(number);
  if (found == pages_.end()) return nullptr;
  last_number_ = number;
  return last_ = const_cast<Page*>(&found->second);
}

}  // namespace toppings::sim
