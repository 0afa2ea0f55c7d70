// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string_view>

namespace toppings {

// A point in a stream, set by Stream::record. Made by Device::make_event. Thread-safe.
class TOPPINGS_EXPORT Event {
 public:
  virtual ~Event() = default;

  // Has everything run that its stream held when it was last recorded? True before the first
  // record. Throws device_failed when that work failed.
  virtual bool is_done() const = 0;

  // Waits on the host; false when the time ran out. Spins for a moment before it sleeps. Throws as
  // is_done does.
  virtual bool wait_for(std::chrono::nanoseconds timeout) const = 0;

  // Seconds on the device from `earlier` to this event; both are done and were recorded. Throws
  // invalid_argument otherwise, or for another device's event.
  virtual double seconds_since(const Event& earlier) const = 0;
};

// Work that a device runs in order; different streams run at the same time. Every call returns
// before its work has run, unless it says otherwise. Throws device_failed when the driver
// refuses, at the latest in synchronize() when earlier work has failed; invalid_argument for
// another device's event. Thread-safe; the destructor of a stream made by make_stream waits for its
// work.
class TOPPINGS_EXPORT Stream {
 public:
  virtual ~Stream() = default;

  // Host to device. host_src stays as it is until the copy has run.
  virtual void copy(void* device_dst, const void* host_src, std::size_t bytes) = 0;

  virtual void record(Event& event) = 0;

  // What is enqueued from now on runs after the event's last record so far.
  virtual void wait(const Event& event) = 0;

  // A 32-bit value in page-locked host memory, 4-byte aligned: written once everything before has
  // run and its bytes are visible; or waited for until it is >= value (as a signed difference, so
  // that counters may wrap).
  virtual void write_value(std::uint32_t* address, std::uint32_t value) = 0;
  virtual void wait_value(const std::uint32_t* address, std::uint32_t value) = 0;

  // Waits on the host for everything enqueued so far.
  virtual void synchronize() = 0;

  virtual void* native() const noexcept = 0;  // cudaStream_t; null on the host
};

enum class DeviceKind : std::uint8_t { host, cuda };

// The only door to memory that adapters live in, and to streams and events. Thread-safe; outlives
// what it made.
class TOPPINGS_EXPORT Device {
 public:
  virtual ~Device() = default;

  virtual DeviceKind kind() const noexcept = 0;
  virtual int index() const noexcept = 0;  // 0 for the host
  // "host", "cuda:0", or with an emulated link "host, link of 4.0 GB/s and 10 us (emulated)".
  virtual std::string_view name() const noexcept = 0;

  // Do kernels read allocate_host's memory as fast as any other, so that images can stay where they
  // are? True for main memory without an emulated link.
  virtual bool is_in_place() const noexcept = 0;

  // Device memory, 64-byte aligned, zero-filled. Throws out_of_memory, or invalid_argument for 0
  // bytes. deallocate takes the size that was asked for; a null pointer is ignored.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void deallocate(void* data, std::size_t bytes) noexcept = 0;

  // The same for host memory that this device copies from at full speed: page-locked, on the
  // device's NUMA node and in large pages, where that means something.
  virtual void* allocate_host(std::size_t bytes) = 0;
  virtual void deallocate_host(void* data, std::size_t bytes) noexcept = 0;

  // Page-locks memory that was allocated elsewhere (shared memory, say), and undoes it.
  virtual void page_lock(void* data, std::size_t bytes) = 0;
  virtual void page_unlock(void* data) noexcept = 0;

  virtual std::unique_ptr<Stream> make_stream() = 0;
  virtual std::unique_ptr<Event> make_event() = 0;

  // A stream that belongs to someone else. cuda: native is a cudaStream_t, null the default stream.
  // host: native is null, and the stream is the calling thread: every call does its work before it
  // returns.
  virtual std::unique_ptr<Stream> wrap_stream(void* native) = 0;

  // Host to device; done when the call returns.
  virtual void copy(void* device_dst, const void* host_src, std::size_t bytes) = 0;
};

// An emulated link between host memory and a host device's memory. All copies under way share its
// capacity equally. A copy uses it once its latency is over, counted from when it was enqueued, and
// the one before it in its stream has ended.
struct HostLink {
  double bytes_per_second;
  double latency_seconds = 0;
  int cpu = -1;  // the core its threads are pinned to; -1: not pinned
};

// Main memory as a device: allocate and allocate_host are the same memory. Its streams are threads.
// With a link, copies take the time they would take on it (or a memcpy's, where that is longer).
// Throws invalid_argument for a bandwidth or a latency that isn't finite and positive (latency 0 is
// allowed), or a core that doesn't exist.
TOPPINGS_EXPORT std::shared_ptr<Device> host_device(std::optional<HostLink> link = std::nullopt);

// A GPU. One object per index. Throws device_failed when the library was compiled without CUDA,
// when there is no driver, or when there is no such GPU.
TOPPINGS_EXPORT std::shared_ptr<Device> cuda_device(int index);

}  // namespace toppings
