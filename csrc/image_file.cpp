// SPDX-License-Identifier: Apache-2.0
#include <toppings/image_file.h>

#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "check.h"
#include "image/crc32c.h"
#include "image/file.h"
#include "image/image_fill.h"
#include "image/image_header.h"

namespace toppings {
namespace {

static_assert(kImageFileVersion == kHeaderVersion);

// What is read at a time: still in the cache when its checksum is computed, and as often a
// cancellation is looked at. The system reads ahead by itself; asked for more (POSIX_FADV_WILLNEED)
// it took twice as long.
constexpr std::int64_t kPieceBytes = std::int64_t{1} << 20;

std::uint32_t checksum(std::uint32_t crc, std::span<const std::byte> bytes) {
  return crc32c(crc, bytes.data(), bytes.size());
}

// The same layout over the caller's shape, so that many images share one.
AdapterLayout with_shape(const AdapterLayout& layout, std::shared_ptr<const ModelShape> shape) {
  std::vector<std::vector<std::int64_t>> ranks;
  for (int layer = 0; layer < shape->num_layers(); ++layer) {
    std::vector<std::int64_t>& row = ranks.emplace_back();
    const int count = static_cast<int>(shape->layer(layer).size());
    for (int i = 0; i < count; ++i) row.push_back(layout.block(layer, i).rank);
  }
  return AdapterLayout(std::move(shape), layout.dtype(), ranks);
}

// Compares the checksum of each layer as soon as its last byte is there.
class LayerChecks {
 public:
  LayerChecks(const InputFile& file, const ImageHeader& header) : file_(file), header_(header) {}

  void next(std::span<const std::byte> bytes) {
    const AdapterLayout& layout = header_.layout;
    while (!bytes.empty()) {
      const std::int64_t end = layout.layer_offset(layer_) + layout.layer_bytes(layer_);
      const auto count = std::min(bytes.size(), static_cast<std::size_t>(end - offset_));
      crc_ = checksum(crc_, bytes.first(count));
      bytes = bytes.subspan(count);
      offset_ += static_cast<std::int64_t>(count);
      if (offset_ == end) finish_layer();
    }
  }

 private:
  void finish_layer() {
    const std::uint32_t stored = header_.checksums[static_cast<std::size_t>(layer_)];
    if (crc_ != stored) {
      fail(Status::format, file_.path() + ": checksum of layer " + std::to_string(layer_),
           std::to_string(stored), std::to_string(crc_));
    }
    ++layer_;
    crc_ = 0;
  }

  const InputFile& file_;
  const ImageHeader& header_;
  int layer_ = 0;
  std::int64_t offset_ = 0;  // in the image
  std::uint32_t crc_ = 0;    // of the layer so far
};

void read_layers(const InputFile& file, const ImageHeader& header, std::span<std::byte> image,
                 ReadProgress& progress) {
  LayerChecks checks(file, header);
  const auto total = static_cast<std::int64_t>(image.size());
  for (std::int64_t done = 0; done < total;) {
    if (progress.cancel) {
      fail(Status::cancelled, file.path(), "to be read", "a cancellation");
    }
    const std::int64_t count = std::min(kPieceBytes, total - done);
    const std::span<std::byte> piece =
        image.subspan(static_cast<std::size_t>(done), static_cast<std::size_t>(count));
    file.read(piece.data(), piece.size(), header.data_offset + done);
    checks.next(piece);
    done += count;
    progress.bytes_read = done;
  }
}

}  // namespace

void write_image(const Image& image, const std::string& path) {
  const AdapterLayout& layout = image.layout();
  const ModelShape& shape = *layout.shape();
  ImageHeader header{
      .digest = image.digest(), .layout = layout, .scales = {}, .checksums = {}, .data_offset = 0};
  for (int layer = 0; layer < shape.num_layers(); ++layer) {
    const auto bytes = static_cast<std::size_t>(layout.layer_bytes(layer));
    header.checksums.push_back(crc32c(0, image.layer_data(layer), bytes));
    const int count = static_cast<int>(shape.layer(layer).size());
    for (int i = 0; i < count; ++i) header.scales.push_back(image.scale(layer, i));
  }
  const std::vector<std::byte> bytes = encode_header(header);
  OutputFile file(path);
  file.write(bytes.data(), bytes.size());
  file.write(image.layer_data(0), static_cast<std::size_t>(layout.bytes()));
  file.commit();
}

ImageFileHeader read_image_header(const std::string& path) {
  ImageHeader header = decode_header(InputFile(path));
  return {.digest = std::move(header.digest),
          .layout = std::move(header.layout),
          .scales = std::move(header.scales)};
}

std::shared_ptr<const Image> read_image(HostStore& store, const std::string& path,
                                        std::shared_ptr<const ModelShape> shape,
                                        std::chrono::nanoseconds patience, ReadProgress* progress) {
  ReadProgress unseen;
  if (progress == nullptr) progress = &unseen;
  const InputFile file(path);
  ImageHeader header = decode_header(file);
  AdapterLayout& layout = header.layout;
  if (shape != nullptr) {
    if (*shape != *layout.shape()) {
      fail(Status::mismatch, path, "an image for this base model", "one for another");
    }
    layout = with_shape(layout, std::move(shape));
  }
  progress->bytes_total = layout.bytes();
  if (auto present = store.find(header.digest); present != nullptr) {
    if (present->layout() != layout) {
      fail(Status::invalid_argument, path, "the layout of the image of this digest in the store",
           "another (" + std::string(name_of(layout.dtype())) + ")");
    }
    progress->bytes_read = layout.bytes();
    return present;
  }
  ImageBuilder builder = store.build(layout, header.digest, patience, &progress->cancel);
  read_layers(file, header, ImageFill::bytes(builder), *progress);
  ImageFill::finish(builder, std::move(header.scales));
  return store.insert(std::move(builder));
}

}  // namespace toppings
