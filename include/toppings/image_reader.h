// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>
#include <toppings/host_store.h>
#include <toppings/image_file.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

namespace toppings {

// One file being read in the background. Dropping it doesn't stop the read. While it lives, the
// image is in use. Thread-safe.
class TOPPINGS_EXPORT ReadTicket {
 public:
  virtual ~ReadTicket() = default;

  virtual std::int64_t bytes_read() const noexcept = 0;
  virtual std::int64_t bytes_total() const noexcept = 0;  // 0 until the header has been read
  virtual bool is_done() const noexcept = 0;              // read, failed or cancelled

  // The image; nullptr when the time ran out. Throws what made the read fail, or cancelled.
  virtual std::shared_ptr<const Image> wait_for(std::chrono::nanoseconds timeout) = 0;

  virtual void cancel() noexcept = 0;
};

// Reads image files into a store in the background, a bounded number at the same time, first come
// first served. Thread-safe.
class TOPPINGS_EXPORT ImageReader {
 public:
  // Throws invalid_argument: no store, fewer than one reads at a time.
  ImageReader(std::shared_ptr<HostStore> store, int parallel_reads);
  // Cancels what is under way and waits for it to stop.
  ~ImageReader();
  ImageReader(const ImageReader&) = delete;
  ImageReader& operator=(const ImageReader&) = delete;

  // shape, patience: as in read_image.
  std::shared_ptr<ReadTicket> read(
      std::string path, std::shared_ptr<const ModelShape> shape = nullptr,
      std::chrono::nanoseconds patience = std::chrono::nanoseconds::zero());

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace toppings
