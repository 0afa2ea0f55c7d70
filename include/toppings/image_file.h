// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>
#include <toppings/host_store.h>
#include <toppings/image.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// An image as a file: what `toppings pack` writes and C++ reads straight into (page-locked) host
// memory, without Python and without conversion. docs/image_format.md describes every byte.
namespace toppings {

inline constexpr std::uint32_t kImageFileVersion = 1;

// What stands before the layer blocks of an image file; checked as a whole, checksum included.
struct ImageFileHeader {
  std::string digest;
  AdapterLayout layout;
  std::vector<float> scales;  // [layout.shape()->num_rows()]
};

// Writes to a temporary file beside `path`, flushes it to the disk and renames it, so that `path`
// is always a whole image or what it was before. Throws io.
TOPPINGS_EXPORT void write_image(const Image& image, const std::string& path);

// Reads and checks everything but the layer blocks; allocates nothing in proportion to what the
// file merely claims. Throws io, format (damaged, cut off, longer than it says), unsupported
// (another version of the format).
TOPPINGS_EXPORT ImageFileHeader read_image_header(const std::string& path);

// Seen and set by several threads while a file is read.
struct ReadProgress {
  std::atomic<std::int64_t> bytes_read = 0;
  std::atomic<std::int64_t> bytes_total = 0;  // 0 until the header has been read
  std::atomic<bool> cancel = false;           // read_image stops at the next piece
};

// Reads a file into the store, or finds its digest there already. Nothing stays in the store when
// it fails. Throws as read_image_header and HostStore::build do, mismatch when `shape` isn't null
// and not the file's, format when a layer block's checksum differs, cancelled.
TOPPINGS_EXPORT std::shared_ptr<const Image> read_image(
    HostStore& store, const std::string& path, std::shared_ptr<const ModelShape> shape = nullptr,
    std::chrono::nanoseconds patience = std::chrono::nanoseconds::zero(),
    ReadProgress* progress = nullptr);

}  // namespace toppings
