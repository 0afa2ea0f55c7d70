// SPDX-License-Identifier: Apache-2.0
#include "image/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <utility>

#include "check.h"

namespace toppings {
namespace {

[[noreturn]] void fail_with(int error, const std::string& path, const char* expected) {
  fail(Status::io, path, expected, std::generic_category().message(error));
}

template <class Call>
auto retry(Call call) {
  for (;;) {
    const auto result = call();
    if (result >= 0 || errno != EINTR) return result;
  }
}

// The system would take what stands before a null character for the whole.
std::string checked(std::string path) {
  if (path.find('\0') == std::string::npos) return path;
  fail(Status::io, "path", "one without null characters", "'" + path + "'");
}

// Two writers of one path, in one process or several, each have their own.
int open_beside(const std::string& path, std::string* name) {
  static std::atomic<unsigned> count = 0;
  for (;;) {
    *name = path + "." + std::to_string(getpid()) + "." + std::to_string(count++) + ".tmp";
    const int fd =
        retry([&] { return open(name->c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666); });
    if (fd >= 0 || errno != EEXIST) return fd;  // left by a process of this number that died
  }
}

}  // namespace

// NONBLOCK: a pipe would otherwise wait for its writer.
InputFile::InputFile(std::string path)
    : path_(checked(std::move(path))),
      fd_(retry([&] { return open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK); })) {
  if (fd_ < 0) fail_with(errno, path_, "a file that can be read");
  struct stat found{};
  const bool is_regular = fstat(fd_, &found) == 0 && S_ISREG(found.st_mode);
  if (!is_regular) {
    close(fd_);
    fail(Status::io, path_, "a regular file", "another kind");
  }
  size_ = found.st_size;
  posix_fadvise(fd_, 0, 0, POSIX_FADV_SEQUENTIAL);
}

InputFile::~InputFile() { close(fd_); }

void InputFile::read(void* dst, std::size_t bytes, std::int64_t offset) const {
  auto* next = static_cast<std::byte*>(dst);
  while (bytes > 0) {
    const ssize_t count = retry([&] { return pread(fd_, next, bytes, offset); });
    if (count < 0) fail_with(errno, path_, "to be read");
    if (count == 0) {
      fail(Status::format, path_,
           std::to_string(bytes) + " bytes more at " + std::to_string(offset),
           "the end of the file");
    }
    next += count;
    offset += count;
    bytes -= static_cast<std::size_t>(count);
  }
}

OutputFile::OutputFile(std::string path) : path_(checked(std::move(path))) {
  fd_ = open_beside(path_, &temporary_);
  if (fd_ < 0) fail_io("a file that can be created");
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) close(fd_);
  if (!temporary_.empty()) unlink(temporary_.c_str());
}

void OutputFile::write(const void* src, std::size_t bytes) {
  const auto* next = static_cast<const std::byte*>(src);
  while (bytes > 0) {
    const ssize_t count = retry([&] { return ::write(fd_, next, bytes); });
    if (count < 0) fail_io("to be written");
    next += count;
    bytes -= static_cast<std::size_t>(count);
  }
}

void OutputFile::commit() {
  if (fsync(fd_) != 0) fail_io("to be flushed");
  if (close(std::exchange(fd_, -1)) != 0) fail_io("to be closed");
  if (rename(temporary_.c_str(), path_.c_str()) != 0)
    fail_io("to be renamed from a temporary file");
  temporary_.clear();
  // The new name is on the disk only when the folder is.
  std::filesystem::path folder = std::filesystem::path(path_).parent_path();
  if (folder.empty()) folder = ".";
  const int fd = retry([&] { return open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); });
  const bool is_flushed = fd >= 0 && fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) close(fd);
  if (!is_flushed) fail_with(error, folder.string(), "a folder that can be flushed");
}

void OutputFile::fail_io(const char* what) const { fail_with(errno, path_, what); }

}  // namespace toppings
