// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest-spi.h>

#include <atomic>
#include <functional>
#include <string>

#include "cuda_fake.h"
#include "device_cases.h"

namespace toppings {
namespace {

using cuda_fake::fail_call;
using testing::DeviceMemory;
using testing::DeviceTest;
using testing::kPatience;
using testing::Memory;

INSTANTIATE_TEST_SUITE_P(
    Cuda, DeviceTest,
    ::testing::Values(testing::DeviceCase{"first", [] { return cuda_device(0); }},
                      testing::DeviceCase{"second", [] { return cuda_device(1); }}),
    [](const auto& info) { return info.param.name; });

// On the second GPU, while the first one is current. Afterwards everything is as it was.
class CudaDevice : public ::testing::Test {
 protected:
  void TearDown() override {
    cuda_fake::heal();
    EXPECT_EQ(cuda_fake::live(), live_);
    int current = -1;
    cudaGetDevice(&current);
    EXPECT_EQ(current, 0);
    cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
    cudaThreadExchangeStreamCaptureMode(&mode);
    EXPECT_EQ(mode, cudaStreamCaptureModeGlobal);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  }

  std::shared_ptr<Device> first_ = cuda_device(0);  // each has a stream of its own for ever
  std::shared_ptr<Device> device_ = cuda_device(1);
  cuda_fake::Live live_ = cuda_fake::live();
};

// Runs `run` with that call failing, and expects the error to say so.
void expect_failure(const std::string& call, Status status, const std::function<void()>& run) {
  const bool is_full = status == Status::out_of_memory;
  fail_call(call, is_full ? cudaErrorMemoryAllocation : cudaErrorIllegalAddress);
  try {
    run();
    ADD_FAILURE() << call << ": expected an error, got none";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), status) << error.what();
    EXPECT_EQ(error.what(),
              call + ": expected success, got " +
                  (is_full ? "cudaErrorMemoryAllocation" : "cudaErrorIllegalAddress") +
                  " (as told)");
  }
}

TEST_F(CudaDevice, SaysWhatItIs) {
  EXPECT_EQ(device_, cuda_device(1));
  EXPECT_NE(device_, first_);
  EXPECT_EQ(device_->kind(), DeviceKind::cuda);
  EXPECT_EQ(device_->index(), 1);
  EXPECT_EQ(device_->name(), "cuda:1");
  EXPECT_FALSE(device_->is_in_place());
}

TEST_F(CudaDevice, RefusesGpusThatArentThere) {
  TOPPINGS_EXPECT_ERROR(cuda_device(-1), device_failed);
  TOPPINGS_EXPECT_ERROR(cuda_device(2), device_failed);
  fail_call("cudaGetDeviceCount", cudaErrorNoDevice);
  try {
    cuda_device(0);
    ADD_FAILURE() << "expected an error, got none";
  } catch (const Error& error) {
    EXPECT_EQ(error.status(), Status::device_failed);
    EXPECT_STREQ(error.what(),
                 "cuda:0: expected a GPU and its driver, got cudaErrorNoDevice (as told)");
  }
}

TEST_F(CudaDevice, TellsWhichCallFailed) {
  const Memory words(device_, 64);
  const DeviceMemory target(device_, 64);
  const auto stream = device_->make_stream();
  const auto event = device_->make_event();
  const auto other = device_->make_event();
  stream->record(*event);
  stream->record(*other);
  ASSERT_TRUE(other->wait_for(kPatience));
  const auto failed = Status::device_failed;
  const auto full = Status::out_of_memory;
  const auto allocate = [&] { device_->allocate(64); };
  const auto allocate_host = [&] { device_->allocate_host(64); };
  const auto make_stream = [&] { device_->make_stream(); };
  const auto copy = [&] { stream->copy(target.data(), words.data(), 4); };
  expect_failure("cudaGetDevice", failed, allocate);
  expect_failure("cudaSetDevice", failed, allocate);
  expect_failure("cudaMalloc", failed, allocate);
  expect_failure("cudaMalloc", full, allocate);
  expect_failure("cudaMemsetAsync", failed, allocate);
  expect_failure("cudaStreamSynchronize", failed, allocate);
  expect_failure("cudaHostRegister", failed, allocate_host);
  expect_failure("cudaHostRegister", full, allocate_host);
  expect_failure("cudaDeviceGetStreamPriorityRange", failed, make_stream);
  expect_failure("cudaStreamCreateWithPriority", failed, make_stream);
  expect_failure("cudaEventCreateWithFlags", failed, [&] { device_->make_event(); });
  expect_failure("cudaMemcpyAsync", failed, copy);
  expect_failure("cudaEventRecord", failed, [&] { stream->record(*event); });
  expect_failure("cudaStreamWaitEvent", failed, [&] { stream->wait(*event); });
  expect_failure("cudaStreamSynchronize", failed, [&] { stream->synchronize(); });
  expect_failure("cudaEventQuery", failed, [&] { event->is_done(); });
  expect_failure("cudaEventQuery", failed, [&] { event->wait_for(kPatience); });
  expect_failure("cudaEventElapsedTime", failed, [&] { other->seconds_since(*event); });
  expect_failure("cudaHostGetDevicePointer", failed,
                 [&] { stream->write_value(words.word(0), 1); });
  expect_failure("cuStreamWriteValue32", failed, [&] { stream->write_value(words.word(0), 1); });
  expect_failure("cuStreamWaitValue32", failed, [&] { stream->wait_value(words.word(0), 0); });
  copy();  // and all is well again
  stream->synchronize();
}

TEST_F(CudaDevice, WorkThatFailsReachesEveryWait) {
  const Memory source(device_, 64);
  const DeviceMemory target(device_, 64);
  {
    const auto stream = device_->make_stream();
    const auto event = device_->make_event();
    fail_call("copy", cudaErrorIllegalAddress, 1);
    stream->copy(target.data(), source.data(), 64);
    stream->synchronize();
    stream->copy(target.data(), source.data(), 64);
    TOPPINGS_EXPECT_ERROR(stream->synchronize(), device_failed);
    TOPPINGS_EXPECT_ERROR(event->is_done(), device_failed);
    TOPPINGS_EXPECT_ERROR(event->wait_for(kPatience), device_failed);
    TOPPINGS_EXPECT_ERROR(stream->copy(target.data(), source.data(), 64), device_failed);
    TOPPINGS_EXPECT_ERROR(device_->copy(target.data(), source.data(), 64), device_failed);
  }
}

TEST_F(CudaDevice, GivesEverythingBackThoughTheGpuFails) {
  void* data = device_->allocate_host(std::size_t{3} << 20);
  auto stream = device_->make_stream();
  fail_call("cudaStreamSynchronize", cudaErrorIllegalAddress);
  stream.reset();
  fail_call("cudaHostUnregister", cudaErrorIllegalAddress);
  device_->deallocate_host(data, std::size_t{3} << 20);
  EXPECT_EQ(cuda_fake::live().locks, live_.locks + 1);
  cudaHostUnregister(data);  // for the fake's books
}

TEST_F(CudaDevice, AForeignStreamIsOnlyBorrowed) {
  const auto owner = device_->make_stream();
  const auto event = device_->make_event();
  const auto wrapped = device_->wrap_stream(owner->native());
  EXPECT_EQ(wrapped->native(), owner->native());
  wrapped->record(*event);
  EXPECT_TRUE(event->wait_for(kPatience));
}

TEST_F(CudaDevice, EventsBelongToOneGpu) {
  const auto stream = device_->make_stream();
  const auto event = first_->make_event();
  TOPPINGS_EXPECT_ERROR(stream->record(*event), invalid_argument);
  TOPPINGS_EXPECT_ERROR(stream->wait(*event), invalid_argument);
}

TEST_F(CudaDevice, AValueMustBeInLockedMemory) {
  const auto stream = device_->make_stream();
  std::uint32_t value = 0;
  TOPPINGS_EXPECT_ERROR(stream->write_value(&value, 1), device_failed);
  TOPPINGS_EXPECT_ERROR(stream->wait_value(&value, 0), device_failed);
}

TEST_F(CudaDevice, RefusesToLockTwice) {
  alignas(4096) static std::byte data[4096];
  device_->page_lock(data, sizeof data);
  TOPPINGS_EXPECT_ERROR(device_->page_lock(data, sizeof data), device_failed);
  device_->page_unlock(data);
  device_->page_unlock(nullptr);
}

TEST_F(CudaDevice, AWaitSleepsBetweenItsQuestions) {
  const Memory words(device_, 64);
  const auto stream = device_->make_stream();
  const auto event = device_->make_event();
  stream->wait_value(words.word(0), 1);
  stream->record(*event);
  const int before = cuda_fake::calls("cudaEventQuery");
  EXPECT_FALSE(event->wait_for(testing::milliseconds(100)));
  EXPECT_LT(cuda_fake::calls("cudaEventQuery") - before, 8000);  // 100 us of spinning, 5000 sleeps
  std::atomic_ref(*words.word(0)).store(1);
  EXPECT_TRUE(event->wait_for(kPatience));
}

// The fake itself: what it is there to notice.
TEST_F(CudaDevice, MistakesAreNoticed) {
  static const auto device = device_;
  static std::byte bytes[64];
  static const DeviceMemory target(device, 64);
  static const Memory source(device, 64);
  static const auto stream = device->make_stream();
  live_ = cuda_fake::live();
  static void* gone = nullptr;
  gone = device->make_stream()->native();
  EXPECT_NONFATAL_FAILURE(device->deallocate(bytes, 64), "isn't allocated");
  EXPECT_NONFATAL_FAILURE(device->page_unlock(bytes), "isn't page-locked");
  EXPECT_NONFATAL_FAILURE(
      TOPPINGS_EXPECT_ERROR(stream->copy(target.data(), bytes, 64), device_failed),
      "isn't page-locked");
  EXPECT_NONFATAL_FAILURE(
      TOPPINGS_EXPECT_ERROR(stream->copy(target.data() + 1, source.data(), 64), device_failed),
      "isn't allocated");
  EXPECT_NONFATAL_FAILURE(
      TOPPINGS_EXPECT_ERROR(device->wrap_stream(gone)->synchronize(), device_failed),
      "doesn't exist");
}

}  // namespace
}  // namespace toppings
