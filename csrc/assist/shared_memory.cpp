// SPDX-License-Identifier: Apache-2.0
#include "assist/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

#include "check.h"

namespace toppings::assist {
namespace {

bool is_posix_name(const std::string& name) {
  return name.size() > 1 && name.front() == '/' && std::ranges::count(name, '/') == 1;
}

std::string text_of(std::size_t bytes) { return std::to_string(bytes) + " bytes"; }

struct flock lock_of(int byte, short type = F_WRLCK) {
  return {.l_type = type, .l_whence = SEEK_SET, .l_start = byte, .l_len = 1, .l_pid = 0};
}

}  // namespace

SharedMemory::SharedMemory(std::size_t bytes) : bytes_(bytes) {
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    fail(Status::out_of_memory, "memory of a channel", text_of(bytes), std::strerror(errno));
  }
  data_ = static_cast<std::byte*>(data);
  madvise(data_, bytes_, MADV_HUGEPAGE);  // fewer TLB misses; only a hint
}

SharedMemory::SharedMemory(std::string name, std::size_t bytes) : bytes_(bytes) {
  if (!is_posix_name(name)) {
    fail(Status::invalid_argument, "name of shared memory", "a slash and no other", name);
  }
  fd_ = shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd_ < 0) {
    fail(Status::invalid_argument, "shared memory " + name, "a name that is free and allowed",
         std::strerror(errno));
  }
  const bool is_possible = bytes <= static_cast<std::size_t>(std::numeric_limits<off_t>::max());
  const int error = is_possible ? posix_fallocate(fd_, 0, static_cast<off_t>(bytes)) : EFBIG;
  try {
    if (error != 0) {
      fail(Status::out_of_memory, "shared memory " + name, text_of(bytes), std::strerror(error));
    }
    map(PROT_READ | PROT_WRITE);
  } catch (...) {
    close(fd_);
    shm_unlink(name.c_str());
    throw;
  }
  name_ = std::move(name);
}

SharedMemory::SharedMemory(const std::string& name, Access access) {
  const int mode = access == Access::write ? O_RDWR : O_RDONLY;
  fd_ = is_posix_name(name) ? shm_open(name.c_str(), mode | O_CLOEXEC, 0)
                            : open(name.c_str(), mode | O_CLOEXEC);
  if (fd_ < 0) fail(Status::not_found, "shared memory", name, std::strerror(errno));
  struct stat status;
  try {
    if (fstat(fd_, &status) != 0 || status.st_size == 0) {
      fail(Status::not_found, "shared memory " + name, "at least 1 byte", "none");
    }
    bytes_ = static_cast<std::size_t>(status.st_size);
    map(access == Access::write ? PROT_READ | PROT_WRITE : PROT_READ);
  } catch (...) {
    close(fd_);
    throw;
  }
}

SharedMemory::~SharedMemory() {
  munmap(data_, bytes_);
  if (fd_ >= 0) close(fd_);
  if (!name_.empty()) shm_unlink(name_.c_str());
}

void SharedMemory::map(int protection) {
  void* data = mmap(nullptr, bytes_, protection, MAP_SHARED, fd_, 0);
  if (data == MAP_FAILED) {
    fail(Status::out_of_memory, "shared memory", text_of(bytes_), std::strerror(errno));
  }
  data_ = static_cast<std::byte*>(data);
}

// Of the open file, not of the process: a process may stand at both ends.
bool SharedMemory::lock(int byte) const {
  struct flock lock = lock_of(byte);
  return fcntl(fd_, F_OFD_SETLK, &lock) == 0;
}

void SharedMemory::unlock(int byte) const {
  struct flock lock = lock_of(byte, F_UNLCK);
  fcntl(fd_, F_OFD_SETLK, &lock);
}

bool SharedMemory::is_locked_elsewhere(int byte) const {
  struct flock lock = lock_of(byte);
  return fcntl(fd_, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
}

void SharedMemory::remove(const std::string& name) noexcept {
  if (is_posix_name(name)) shm_unlink(name.c_str());
}

}  // namespace toppings::assist
