// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <toppings/device.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "check.h"
#include "cuda/device_call.h"
#include "cuda/device_memory.h"
#include "cuda/device_stream.h"

namespace toppings {
namespace {

using cuda::check_call;
using cuda::OnDevice;

void check_bytes(std::size_t bytes) {
  if (bytes == 0) fail(Status::invalid_argument, "bytes", "at least 1", "0");
}

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int index) : index_(index), name_("cuda:" + std::to_string(index)) {
    const OnDevice on(index);
    numa_node_ = cuda::numa_node_of(index);
    own_stream_ = std::make_unique<cuda::CudaStream>(*this);
  }

  DeviceKind kind() const noexcept override { return DeviceKind::cuda; }
  int index() const noexcept override { return index_; }
  std::string_view name() const noexcept override { return name_; }
  bool is_in_place() const noexcept override { return false; }

  void* allocate(std::size_t bytes) override {
    check_bytes(bytes);
    const OnDevice on(index_);
    void* data = nullptr;
    check_call(cudaMalloc(&data, bytes), "cudaMalloc");
    try {
      check_call(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(own_stream_->native())),
                 "cudaMemsetAsync");
      own_stream_->synchronize();
    } catch (...) {
      cudaFree(data);
      throw;
    }
    return data;
  }

  void deallocate(void* data, std::size_t) noexcept override {
    if (data != nullptr) quietly([&] { cudaFree(data); });
  }

  void* allocate_host(std::size_t bytes) override {
    check_bytes(bytes);
    const OnDevice on(index_);
    return cuda::allocate_pinned(bytes, numa_node_);
  }

  void deallocate_host(void* data, std::size_t bytes) noexcept override {
    if (data == nullptr) return;
    page_unlock(data);
    cuda::unmap(data, bytes);
  }

  void page_lock(void* data, std::size_t bytes) override {
    const OnDevice on(index_);
    check_call(cudaHostRegister(data, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped),
               "cudaHostRegister");
  }

  void page_unlock(void* data) noexcept override {
    if (data != nullptr) quietly([&] { cudaHostUnregister(data); });
  }

  std::unique_ptr<Stream> make_stream() override {
    return std::make_unique<cuda::CudaStream>(*this);
  }
  std::unique_ptr<Event> make_event() override { return std::make_unique<cuda::CudaEvent>(*this); }
  std::unique_ptr<Stream> wrap_stream(void* native) override {
    return std::make_unique<cuda::CudaStream>(*this, static_cast<cudaStream_t>(native));
  }

  // On a stream of its own: cudaMemcpy would wait for every blocking stream, and break a capture.
  void copy(void* device_dst, const void* host_src, std::size_t bytes) override {
    own_stream_->copy(device_dst, host_src, bytes);
    own_stream_->synchronize();
  }

 private:
  // Memory can't be given back to a GPU that has failed; its process has lost it anyway.
  template <class F>
  void quietly(F give_back) const noexcept {
    try {
      const OnDevice on(index_);
      give_back();
      cudaGetLastError();
    } catch (const Error&) {
    }
  }

  int index_;
  std::string name_;
  int numa_node_ = -1;
  std::unique_ptr<Stream> own_stream_;
};

}  // namespace

std::shared_ptr<Device> cuda_device(int index) {
  // Never destroyed: at the process's end the CUDA runtime may be gone already.
  static std::mutex mutex;
  static auto& devices = *new std::vector<std::shared_ptr<Device>>;
  const std::lock_guard lock(mutex);
  const std::string name = "cuda:" + std::to_string(index);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    fail(Status::device_failed, name, "a GPU and its driver", cuda::text_of(error));
  }
  if (index < 0 || index >= count) {
    fail(Status::device_failed, name, "one of " + std::to_string(count) + " GPUs", "none of them");
  }
  const auto place = static_cast<std::size_t>(index);
  if (devices.size() <= place) devices.resize(place + 1);
  if (devices[place] == nullptr) devices[place] = std::make_shared<CudaDevice>(index);
  return devices[place];
}

}  // namespace toppings
