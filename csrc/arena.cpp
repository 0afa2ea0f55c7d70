// SPDX-License-Identifier: Apache-2.0
#include <toppings/adapter_layout.h>
#include <toppings/arena.h>

#include <limits>
#include <span>
#include <string>
#include <utility>

#include "check.h"

namespace toppings {
namespace {

std::int64_t round_up(std::int64_t bytes) {
  check_positive("bytes_per_layer", bytes);
  if (bytes > std::numeric_limits<std::int64_t>::max() - kBlockAlignment) {
    fail(Status::invalid_argument, "bytes_per_layer", "less than 2^63", std::to_string(bytes));
  }
  return (bytes + kBlockAlignment - 1) / kBlockAlignment * kBlockAlignment;
}

}  // namespace

Arena::Arena(std::shared_ptr<Device> device, int num_layers, std::int64_t bytes_per_layer,
             DType dtype)
    : device_(std::move(device)), bytes_per_layer_(round_up(bytes_per_layer)), dtype_(dtype) {
  if (device_ == nullptr) fail(Status::invalid_argument, "device", "a device", "null");
  check_positive("num_layers", num_layers);
  layers_.reserve(static_cast<std::size_t>(num_layers));
  try {
    for (int layer = 0; layer < num_layers; ++layer) {
      layers_.push_back(
          static_cast<std::byte*>(device_->allocate(static_cast<std::size_t>(bytes_per_layer_))));
    }
  } catch (...) {
    deallocate();
    throw;
  }
}

std::shared_ptr<Arena> Arena::in_place(std::shared_ptr<HostStore> store, int num_layers,
                                       DType dtype) {
  if (store == nullptr) fail(Status::invalid_argument, "store", "a host store", "null");
  check_positive("num_layers", num_layers);
  const std::span<const std::byte> region = store->region();
  if (region.empty()) {
    fail(Status::invalid_argument, "store", "one whose device uses images in place",
         std::string(store->device()->name()));
  }
  const std::shared_ptr<Arena> arena(new Arena());
  arena->device_ = store->device();
  arena->bytes_per_layer_ = static_cast<std::int64_t>(region.size());
  arena->dtype_ = dtype;
  // Images are never written through it: the loader leaves such an arena alone.
  arena->layers_.assign(static_cast<std::size_t>(num_layers),
                        const_cast<std::byte*>(region.data()));
  arena->store_ = std::move(store);
  return arena;
}

Arena::~Arena() { deallocate(); }

void Arena::deallocate() noexcept {
  if (is_in_place()) return;
  for (std::byte* data : layers_) {
    device_->deallocate(data, static_cast<std::size_t>(bytes_per_layer_));
  }
}

std::byte* Arena::layer(int layer) const {
  check_index("layer", layer, num_layers());
  return layers_[static_cast<std::size_t>(layer)];
}

}  // namespace toppings
