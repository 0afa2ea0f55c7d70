// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace toppings {

// A regular file, open for reading. Errors name its path. Thread-safe.
class InputFile {
 public:
  // Throws io.
  explicit InputFile(std::string path);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;

  const std::string& path() const noexcept { return path_; }
  std::int64_t size() const noexcept { return size_; }  // when it was opened

  // Throws io, or format when the file ends before.
  void read(void* dst, std::size_t bytes, std::int64_t offset) const;

 private:
  std::string path_;
  int fd_;
  std::int64_t size_;
};

// A file that appears at `path` as a whole or not at all: it is written beside it and renamed.
class OutputFile {
 public:
  // Throws io.
  explicit OutputFile(std::string path);
  ~OutputFile();  // unless it was committed, nothing is left of it
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  // Appends. Throws io.
  void write(const void* src, std::size_t bytes);

  // Flushes to the disk and takes the place of what was at `path`. Throws io.
  void commit();

 private:
  [[noreturn]] void fail_io(const char* what) const;

  std::string path_;
  std::string temporary_;
  int fd_;
};

}  // namespace toppings
