// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/adapter_layout.h>
#include <toppings/export.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace toppings {

class HostBuffer;  // memory of a host store; gives its bytes back to the store's budget
class ImageFill;   // fills a whole image at once, from a file

// All layer blocks of one adapter in host memory, ready to be copied to a device as they are.
// Padding between blocks is zero. Immutable.
class TOPPINGS_EXPORT Image {
 public:
  ~Image();
  Image(const Image&) = delete;
  Image& operator=(const Image&) = delete;

  const std::string& digest() const noexcept { return digest_; }
  const AdapterLayout& layout() const noexcept { return layout_; }
  float scale(int layer, int projection) const;  // 0 where the rank is 0

  const std::byte* layer_data(int layer) const;  // [layout.layer_bytes(layer)], 64-byte aligned

 private:
  friend class ImageBuilder;
  friend class HostStore;
  Image(std::string digest, AdapterLayout layout, std::vector<float> scales,
        std::unique_ptr<HostBuffer> buffer);

  std::string digest_;
  AdapterLayout layout_;
  std::vector<float> scales_;  // [shape.num_rows()]
  std::unique_ptr<HostBuffer> buffer_;
};

// Fills an image block by block: casts to the layout's dtype and stores B rank-major. Made by
// HostStore::build, which has already reserved the bytes; a builder that is dropped gives them
// back. Not thread-safe.
class TOPPINGS_EXPORT ImageBuilder {
 public:
  ImageBuilder(ImageBuilder&&) noexcept;
  ImageBuilder& operator=(ImageBuilder&&) noexcept;
  ~ImageBuilder();

  const AdapterLayout& layout() const noexcept { return layout_; }

  // a [rank, in], b [out, rank] as PEFT stores them, both contiguous, of dtype src and aligned to
  // its size. Throws invalid_argument for a block of rank 0, a block set twice, a scale that isn't
  // finite, or values that overflow the layout's dtype (the block then still counts as not set).
  void set(int layer, int projection, const void* a, const void* b, DType src, float scale);

 private:
  friend class HostStore;
  friend class ImageFill;
  ImageBuilder(std::string digest, AdapterLayout layout, std::unique_ptr<HostBuffer> buffer);
  // Throws invalid_argument when a block was never set; the builder can be completed then.
  std::shared_ptr<const Image> finish() &&;

  std::string digest_;
  AdapterLayout layout_;
  std::vector<float> scales_;
  std::vector<bool> is_set_;            // [shape.num_rows()]
  std::unique_ptr<HostBuffer> buffer_;  // null after finish() or a move: the builder is empty
};

}  // namespace toppings
