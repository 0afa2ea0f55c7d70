// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cuda_runtime_api.h>
#include <toppings/device.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>

namespace toppings::cuda {

class CudaEvent final : public Event {
 public:
  explicit CudaEvent(const Device& device);
  ~CudaEvent() override;

  bool is_done() const override;
  bool wait_for(std::chrono::nanoseconds timeout) const override;
  double seconds_since(const Event& earlier) const override;

  const Device& device() const noexcept { return *device_; }
  cudaEvent_t native() const noexcept { return event_; }
  void set_recorded() noexcept { is_recorded_.store(true); }

 private:
  void check_timed(const char* what) const;

  const Device* device_;
  cudaEvent_t event_ = nullptr;
  std::atomic<bool> is_recorded_{false};
};

class CudaStream final : public Stream {
 public:
  // A stream that doesn't wait for the legacy default stream, of the highest priority: what is
  // copied or signalled is what others wait for.
  explicit CudaStream(const Device& device);
  // Somebody else's.
  CudaStream(const Device& device, cudaStream_t stream) : device_(&device), stream_(stream) {}
  ~CudaStream() override;

  void copy(void* device_dst, const void* host_src, std::size_t bytes) override;
  void record(Event& event) override;
  void wait(const Event& event) override;
  void write_value(std::uint32_t* address, std::uint32_t value) override;
  void wait_value(const std::uint32_t* address, std::uint32_t value) override;
  void synchronize() override;
  void* native() const noexcept override { return stream_; }

 private:
  const Device* device_;
  cudaStream_t stream_ = nullptr;
  bool is_own_ = false;
};

}  // namespace toppings::cuda
