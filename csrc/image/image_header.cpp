// SPDX-License-Identifier: Apache-2.0
#include "image/image_header.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "check.h"
#include "image/crc32c.h"

namespace toppings {
namespace {

static_assert(std::endian::native == std::endian::little, "numbers are copied as they are");

// As in PNG: a file that went through a conversion of line ends or to 7 bits is told at once.
constexpr std::string_view kMagic("\x89TPG\r\n\x1A\n", 8);

constexpr std::size_t kVersionOffset = kMagic.size();
constexpr std::size_t kPrefixBytes = 48;  // up to the digest
constexpr std::size_t kChecksumBytes = 4;
// A model of 10 000 projections needs one megabyte. What a header is made into takes a few times
// its bytes.
constexpr std::size_t kMaxHeaderBytes = std::size_t{16} << 20;

class Writer {
 public:
  template <class T>
  void number(T value) {
    const auto bytes = std::bit_cast<std::array<std::byte, sizeof(T)>>(value);
    bytes_.insert(bytes_.end(), bytes.begin(), bytes.end());
  }
  template <class T>
  void number_at(std::size_t offset, T value) {
    std::memcpy(bytes_.data() + offset, &value, sizeof value);
  }
  void text(std::string_view text) {
    const auto* data = reinterpret_cast<const std::byte*>(text.data());
    bytes_.insert(bytes_.end(), data, data + text.size());
  }
  std::vector<std::byte>& bytes() noexcept { return bytes_; }

 private:
  std::vector<std::byte> bytes_;
};

// Takes numbers and text from the front of a header, never beyond its end.
class Cursor {
 public:
  explicit Cursor(std::span<const std::byte> bytes) : bytes_(bytes) {}

  template <class T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }
  std::string text(std::size_t bytes) {
    const std::span<const std::byte> taken = take(bytes);
    return {reinterpret_cast<const char*>(taken.data()), taken.size()};
  }
  std::size_t left() const noexcept { return bytes_.size(); }

 private:
  std::span<const std::byte> take(std::size_t bytes) {
    if (bytes > bytes_.size()) {
      fail(Status::format, "header", std::to_string(bytes) + " bytes more",
           std::to_string(bytes_.size()));
    }
    const std::span<const std::byte> taken = bytes_.first(bytes);
    bytes_ = bytes_.subspan(bytes);
    return taken;
  }

  std::span<const std::byte> bytes_;
};

// No overlong forms, no surrogates, nothing beyond U+10FFFF.
bool is_utf8(std::string_view text) {
  const auto byte = [text](std::size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U;
  };
  for (std::size_t i = 0; i < text.size();) {
    const unsigned lead = byte(i);
    const std::size_t more = lead < 0x80 ? 0 : lead < 0xE0 ? 1 : lead < 0xF0 ? 2 : 3;
    if (lead >= 0x80 && (lead < 0xC2 || lead > 0xF4)) return false;
    for (std::size_t k = 1; k <= more; ++k) {
      if (byte(i + k) >> 6 != 2) return false;
    }
    const unsigned second = byte(i + 1);
    if (lead == 0xE0 && second < 0xA0) return false;
    if (lead == 0xED && second > 0x9F) return false;
    if (lead == 0xF0 && second < 0x90) return false;
    if (lead == 0xF4 && second > 0x8F) return false;
    i += more + 1;
  }
  return true;
}

std::int64_t rounded_up(std::size_t bytes) {
  return (static_cast<std::int64_t>(bytes) + kDataAlignment - 1) / kDataAlignment * kDataAlignment;
}

void check_text(Status status, const char* what, std::string_view text) {
  if (!text.empty() && is_utf8(text)) return;
  fail(status, what, "UTF-8 text", text.empty() ? "none" : "other bytes");
}

DType dtype_of(std::uint32_t number) {
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16}) {
    if (static_cast<std::uint32_t>(dtype) == number) return dtype;
  }
  fail(Status::format, "dtype", "0, 1 or 2", std::to_string(number));
}

// The bytes of the header proper, of which only the lengths and the checksum have been looked at.
std::vector<std::byte> read_bytes(const InputFile& file, std::int64_t* data_offset) {
  const auto size = static_cast<std::uint64_t>(file.size());
  std::vector<std::byte> first(std::min<std::size_t>(size, kPrefixBytes));
  file.read(first.data(), first.size(), 0);
  Cursor prefix(first);
  if (first.size() < kMagic.size() || prefix.text(kMagic.size()) != kMagic) {
    fail(Status::format, "file", "a packed image", "other bytes");
  }
  const auto version = prefix.number<std::uint32_t>();
  if (version != kHeaderVersion) {
    fail(Status::unsupported, "version of the format", std::to_string(kHeaderVersion),
         std::to_string(version));
  }
  const auto header_bytes = prefix.number<std::uint32_t>();
  const std::uint64_t most = std::min<std::uint64_t>(size, kMaxHeaderBytes);
  if (header_bytes < kPrefixBytes + kChecksumBytes || header_bytes > most) {
    fail(Status::format, "header", "between 52 and " + std::to_string(most) + " bytes",
         std::to_string(header_bytes));
  }
  *data_offset = rounded_up(header_bytes);
  if (static_cast<std::uint64_t>(*data_offset) > size) {
    fail(Status::format, "file", std::to_string(*data_offset) + " bytes before the first layer",
         std::to_string(size));
  }
  std::vector<std::byte> bytes(static_cast<std::size_t>(*data_offset));
  file.read(bytes.data(), bytes.size(), 0);
  const auto padding = bytes.begin() + header_bytes;
  if (std::any_of(padding, bytes.end(), [](std::byte byte) { return byte != std::byte{0}; })) {
    fail(Status::format, "padding of the header", "zeros", "other bytes");
  }
  bytes.resize(header_bytes);
  std::uint32_t stored = 0;
  std::memcpy(&stored, bytes.data() + bytes.size() - kChecksumBytes, kChecksumBytes);
  bytes.resize(bytes.size() - kChecksumBytes);
  const std::uint32_t computed = crc32c(0, bytes.data(), bytes.size());
  if (computed != stored) {
    fail(Status::format, "checksum of the header", std::to_string(stored),
         std::to_string(computed));
  }
  return bytes;
}

float decode_scale(Cursor& cursor, std::int64_t rank) {
  const auto scale = cursor.number<float>();
  if (!std::isfinite(scale)) fail(Status::format, "scale", "a finite number", "another");
  if (rank == 0 && scale != 0) fail(Status::format, "scale at rank 0", "0", std::to_string(scale));
  return scale;
}

ImageHeader decode(std::span<const std::byte> bytes, std::int64_t data_offset,
                   std::int64_t file_bytes) {
  Cursor cursor(bytes.subspan(kVersionOffset + 8));
  const auto claimed_bytes = cursor.number<std::uint64_t>();
  const auto claimed_offset = cursor.number<std::uint64_t>();
  const DType dtype = dtype_of(cursor.number<std::uint32_t>());
  const auto num_layers = cursor.number<std::uint32_t>();
  const auto digest_bytes = cursor.number<std::uint32_t>();
  if (const auto reserved = cursor.number<std::uint32_t>(); reserved != 0) {
    fail(Status::format, "reserved number", "0", std::to_string(reserved));
  }
  if (claimed_offset != static_cast<std::uint64_t>(data_offset)) {
    fail(Status::format, "offset of the first layer", std::to_string(data_offset),
         std::to_string(claimed_offset));
  }
  if (claimed_bytes != static_cast<std::uint64_t>(file_bytes)) {
    fail(Status::format, "file", std::to_string(claimed_bytes) + " bytes as its header says",
         std::to_string(file_bytes));
  }
  std::string digest = cursor.text(digest_bytes);
  check_text(Status::format, "digest", digest);

  // Every layer and every projection takes bytes of the header, so nothing grows beyond those.
  std::vector<std::vector<Projection>> layers;
  std::vector<std::vector<std::int64_t>> ranks;
  std::vector<std::uint64_t> layer_bytes;
  std::vector<std::uint32_t> checksums;
  std::vector<float> scales;
  for (std::uint32_t layer = 0; layer < num_layers; ++layer) {
    layer_bytes.push_back(cursor.number<std::uint64_t>());
    checksums.push_back(cursor.number<std::uint32_t>());
    const auto num_projections = cursor.number<std::uint32_t>();
    std::vector<Projection>& projections = layers.emplace_back();
    std::vector<std::int64_t>& layer_ranks = ranks.emplace_back();
    for (std::uint32_t i = 0; i < num_projections; ++i) {
      const auto in = cursor.number<std::uint32_t>();
      const auto out = cursor.number<std::uint32_t>();
      layer_ranks.push_back(cursor.number<std::uint32_t>());
      scales.push_back(decode_scale(cursor, layer_ranks.back()));
      const auto name_bytes = cursor.number<std::uint32_t>();
      projections.push_back({.name = cursor.text(name_bytes), .in = in, .out = out});
      check_text(Status::format, "projection", projections.back().name);
    }
  }
  if (cursor.left() != 0) {
    fail(Status::format, "header", "no bytes after the last projection",
         std::to_string(cursor.left()));
  }
  AdapterLayout layout(std::make_shared<const ModelShape>(std::move(layers)), dtype, ranks);
  for (std::size_t layer = 0; layer < layer_bytes.size(); ++layer) {
    const std::int64_t expected = layout.layer_bytes(static_cast<int>(layer));
    if (layer_bytes[layer] == static_cast<std::uint64_t>(expected)) continue;
    fail(Status::format, "layer " + std::to_string(layer),
         std::to_string(expected) + " bytes by its ranks", std::to_string(layer_bytes[layer]));
  }
  if (layout.bytes() != file_bytes - data_offset) {
    fail(Status::format, "layers", std::to_string(layout.bytes()) + " bytes by their ranks",
         std::to_string(file_bytes - data_offset));
  }
  return {.digest = std::move(digest),
          .layout = std::move(layout),
          .scales = std::move(scales),
          .checksums = std::move(checksums),
          .data_offset = data_offset};
}

std::uint32_t as_u32(const char* what, std::size_t value) {
  if (value <= std::numeric_limits<std::uint32_t>::max()) return static_cast<std::uint32_t>(value);
  fail(Status::invalid_argument, what, "below 2^32", std::to_string(value));
}

}  // namespace

std::vector<std::byte> encode_header(const ImageHeader& header) {
  const AdapterLayout& layout = header.layout;
  const ModelShape& shape = *layout.shape();
  check_text(Status::invalid_argument, "digest", header.digest);
  Writer writer;
  writer.text(kMagic);
  writer.number(kHeaderVersion);
  const std::size_t lengths = writer.bytes().size();
  writer.number(std::uint32_t{0});  // the header's and the file's length, and the data's offset:
  writer.number(std::uint64_t{0});  // known at the end
  writer.number(std::uint64_t{0});
  writer.number(static_cast<std::uint32_t>(layout.dtype()));
  writer.number(static_cast<std::uint32_t>(shape.num_layers()));
  writer.number(as_u32("length of the digest", header.digest.size()));
  writer.number(std::uint32_t{0});
  writer.text(header.digest);
  for (int layer = 0; layer < shape.num_layers(); ++layer) {
    const std::vector<Projection>& projections = shape.layer(layer);
    writer.number(static_cast<std::uint64_t>(layout.layer_bytes(layer)));
    writer.number(header.checksums[static_cast<std::size_t>(layer)]);
    writer.number(as_u32("projections", projections.size()));
    for (int i = 0; i < static_cast<int>(projections.size()); ++i) {
      const Projection& projection = projections[static_cast<std::size_t>(i)];
      check_text(Status::invalid_argument, "projection", projection.name);
      writer.number(static_cast<std::uint32_t>(projection.in));
      writer.number(static_cast<std::uint32_t>(projection.out));
      writer.number(static_cast<std::uint32_t>(layout.block(layer, i).rank));
      writer.number(header.scales[static_cast<std::size_t>(shape.row(layer, i))]);
      writer.number(as_u32("length of a name", projection.name.size()));
      writer.text(projection.name);
    }
  }
  const std::size_t header_bytes = writer.bytes().size() + kChecksumBytes;
  if (header_bytes > kMaxHeaderBytes) {
    fail(Status::invalid_argument, "header of the image file",
         "at most " + std::to_string(kMaxHeaderBytes) + " bytes", std::to_string(header_bytes));
  }
  const std::int64_t data_offset = rounded_up(header_bytes);
  writer.number_at(lengths, static_cast<std::uint32_t>(header_bytes));
  writer.number_at(lengths + 4, static_cast<std::uint64_t>(data_offset + layout.bytes()));
  writer.number_at(lengths + 12, static_cast<std::uint64_t>(data_offset));
  writer.number(crc32c(0, writer.bytes().data(), writer.bytes().size()));
  writer.bytes().resize(static_cast<std::size_t>(data_offset));
  return std::move(writer.bytes());
}

ImageHeader decode_header(const InputFile& file) {
  try {
    std::int64_t data_offset = 0;
    const std::vector<std::byte> bytes = read_bytes(file, &data_offset);
    return decode(bytes, data_offset, file.size());
  } catch (const Error& error) {
    if (error.status() == Status::io) throw;
    // What ModelShape and AdapterLayout refuse is damage here.
    const Status status =
        error.status() == Status::unsupported ? Status::unsupported : Status::format;
    throw Error(status, file.path() + ": " + error.what());
  }
}

}  // namespace toppings
