// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <string>

namespace toppings::assist {

// Memory that processes may share, zero at first.
//
// A name is one of POSIX shared memory ("/toppings-1"), or the path of a file: /proc/PID/fd/N is
// memory without a name, of another process. A lock on one of its bytes tells that somebody lives:
// the kernel drops it with its process, however that ends, and no number of a process that could be
// used again is involved. (A child forked from the holder, and not replaced by exec, holds it too.)
class SharedMemory {
 public:
  enum class Access { read, write };

  // For this process alone. Throws out_of_memory.
  explicit SharedMemory(std::size_t bytes);

  // A new one under a name, which the destructor removes. All of it is memory at once, so that none
  // can be missing later. Throws invalid_argument for a name that is taken or impossible,
  // out_of_memory.
  SharedMemory(std::string name, std::size_t bytes);

  // One that is there, all of it. Throws not_found.
  SharedMemory(const std::string& name, Access access);

  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  std::byte* data() const noexcept { return data_; }
  std::size_t bytes() const noexcept { return bytes_; }
  bool is_shared() const noexcept { return fd_ >= 0; }

  // False: somebody else has it. Both are for shared memory alone.
  bool lock(int byte) const;
  void unlock(int byte) const;
  bool is_locked_elsewhere(int byte) const;

  // Removes a name that its owner left behind.
  static void remove(const std::string& name) noexcept;

 private:
  void map(int protection);

  std::string name_;  // to remove; empty: none
  int fd_ = -1;
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace toppings::assist
