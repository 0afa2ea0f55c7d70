// SPDX-License-Identifier: Apache-2.0
#include "cuda/device_stream.h"

#include <cuda.h>

#include <string>
#include <thread>
#include <utility>

#include "check.h"
#include "cuda/device_call.h"
#include "host/spin.h"

namespace toppings::cuda {
namespace {

// A copy of a small layer block, say. After that a thread that polls leaves the core to others.
constexpr std::chrono::microseconds kQuerySpin{100}, kQuerySleep{20};

// Of those of the driver, which the runtime lacks; in this form since CUDA 11.7.
struct ValueCalls {
  decltype(&cuStreamWriteValue32) write;
  decltype(&cuStreamWaitValue32) wait;
};

template <class F>
F driver_call(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
  check_call(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &found),
             "cudaGetDriverEntryPointByVersion");
  if (found != cudaDriverEntryPointSuccess || function == nullptr) {
    fail(Status::device_failed, "the driver", std::string("one with ") + name, "one without");
  }
  return reinterpret_cast<F>(function);
}

const ValueCalls& value_calls() {
  static const ValueCalls calls{
      .write = driver_call<decltype(&cuStreamWriteValue32)>("cuStreamWriteValue32"),
      .wait = driver_call<decltype(&cuStreamWaitValue32)>("cuStreamWaitValue32")};
  return calls;
}

// The driver's codes and the runtime's are the same numbers.
void check_driver(CUresult result, const char* call) {
  check_call(static_cast<cudaError_t>(result), call);
}

CUdeviceptr mapped(const std::uint32_t* address) {
  void* pointer = nullptr;
  check_call(cudaHostGetDevicePointer(&pointer, const_cast<std::uint32_t*>(address), 0),
             "cudaHostGetDevicePointer");
  return reinterpret_cast<CUdeviceptr>(pointer);
}

const CudaEvent& cuda_event(const Event& event, const Device& device) {
  const auto* own = dynamic_cast<const CudaEvent*>(&event);
  if (own == nullptr || &own->device() != &device) {
    fail(Status::invalid_argument, "event", "one of " + std::string(device.name()),
         "another device's");
  }
  return *own;
}

}  // namespace

CudaEvent::CudaEvent(const Device& device) : device_(&device) {
  const OnDevice on(device.index());
  check_call(cudaEventCreateWithFlags(&event_, cudaEventDefault), "cudaEventCreateWithFlags");
}

CudaEvent::~CudaEvent() {
  try {
    const OnDevice on(device_->index());
    cudaEventDestroy(event_);
  } catch (const Error&) {  // a destructor can't tell; the process has lost its GPU
  }
}

bool CudaEvent::is_done() const {
  const OnDevice on(device_->index());
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) return false;
  check_call(error, "cudaEventQuery");
  return true;
}

bool CudaEvent::wait_for(std::chrono::nanoseconds timeout) const {
  const SteadyTime deadline = steady_deadline(timeout);
  const SteadyTime spun = steady_now() + kQuerySpin;
  if (spin_until(deadline < spun ? deadline : spun, [&] { return is_done(); })) return true;
  while (steady_now() < deadline) {
    std::this_thread::sleep_for(kQuerySleep);
    if (is_done()) return true;
  }
  return is_done();
}

void CudaEvent::check_timed(const char* what) const {
  const bool is_recorded = is_recorded_.load();
  if (is_recorded && is_done()) return;
  fail(Status::invalid_argument, what, "one that was recorded and is done",
       is_recorded ? "one that isn't done" : "one never recorded");
}

double CudaEvent::seconds_since(const Event& earlier) const {
  const CudaEvent& begin = cuda_event(earlier, *device_);
  begin.check_timed("the earlier event");
  check_timed("the event");
  const OnDevice on(device_->index());
  float milliseconds = 0;
  check_call(cudaEventElapsedTime(&milliseconds, begin.event_, event_), "cudaEventElapsedTime");
  return static_cast<double>(milliseconds) * 1e-3;
}

CudaStream::CudaStream(const Device& device) : device_(&device), is_own_(true) {
  const OnDevice on(device.index());
  int least = 0, greatest = 0;
  check_call(cudaDeviceGetStreamPriorityRange(&least, &greatest),
             "cudaDeviceGetStreamPriorityRange");
  check_call(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, greatest),
             "cudaStreamCreateWithPriority");
}

CudaStream::~CudaStream() {
  if (!is_own_) return;
  try {
    const OnDevice on(device_->index());
    cudaStreamSynchronize(stream_);
    cudaStreamDestroy(stream_);
  } catch (const Error&) {  // a destructor can't tell; the process has lost its GPU
  }
}

void CudaStream::copy(void* device_dst, const void* host_src, std::size_t bytes) {
  const OnDevice on(device_->index());
  check_call(cudaMemcpyAsync(device_dst, host_src, bytes, cudaMemcpyHostToDevice, stream_),
             "cudaMemcpyAsync");
}

void CudaStream::record(Event& event) {
  const CudaEvent& own = cuda_event(event, *device_);
  const OnDevice on(device_->index());
  check_call(cudaEventRecord(own.native(), stream_), "cudaEventRecord");
  const_cast<CudaEvent&>(own).set_recorded();
}

void CudaStream::wait(const Event& event) {
  const CudaEvent& own = cuda_event(event, *device_);
  const OnDevice on(device_->index());
  check_call(cudaStreamWaitEvent(stream_, own.native(), 0), "cudaStreamWaitEvent");
}

void CudaStream::write_value(std::uint32_t* address, std::uint32_t value) {
  const OnDevice on(device_->index());
  check_driver(value_calls().write(stream_, mapped(address), value, CU_STREAM_WRITE_VALUE_DEFAULT),
               "cuStreamWriteValue32");
}

void CudaStream::wait_value(const std::uint32_t* address, std::uint32_t value) {
  const OnDevice on(device_->index());
  check_driver(value_calls().wait(stream_, mapped(address), value, CU_STREAM_WAIT_VALUE_GEQ),
               "cuStreamWaitValue32");
}

void CudaStream::synchronize() {
  const OnDevice on(device_->index());
  check_call(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
}

}  // namespace toppings::cuda
