// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/adapter_layout.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "image/file.h"

// The bytes of an image file before its layer blocks; docs/image_format.md has the table.
namespace toppings {

inline constexpr std::uint32_t kHeaderVersion = 1;
inline constexpr std::int64_t kDataAlignment = 4096;

struct ImageHeader {
  std::string digest;
  AdapterLayout layout;
  std::vector<float> scales;             // [layout.shape()->num_rows()]
  std::vector<std::uint32_t> checksums;  // [num_layers], CRC-32C of each layer block
  std::int64_t data_offset;              // where the first layer block starts
};

// Up to data_offset, padding included. Throws invalid_argument for what the format can't hold.
std::vector<std::byte> encode_header(const ImageHeader& header);

// Checked as a whole, also against the file's size. Throws as read_image_header does.
ImageHeader decode_header(const InputFile& file);

}  // namespace toppings
