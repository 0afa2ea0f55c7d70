// SPDX-License-Identifier: Apache-2.0
// Streams and events. A stream is a thread; one condition variable tells all of everything.
#include <cuda.h>

#include <atomic>
#include <cstring>
#include <utility>

#include "memory.h"
#include "state.h"

using namespace toppings::cuda_fake;

namespace {

template <class T, class Handle>
std::shared_ptr<T> find(const std::map<std::uintptr_t, std::shared_ptr<T>>& all, Handle handle,
                        const char* call) {
  const std::lock_guard lock(state().mutex);
  const auto found = all.find(reinterpret_cast<std::uintptr_t>(handle));
  if (found == all.end()) {
    mistake(std::string(call) + " on a stream or event that doesn't exist");
    return nullptr;
  }
  if (found->second->device != current()) {
    mistake(std::string(call) + " on another device than the current one");
  }
  return found->second;
}

std::shared_ptr<Stream> stream_of(cudaStream_t handle, const char* call) {
  return find(state().streams, handle, call);
}

std::shared_ptr<Event> event_of(cudaEvent_t handle, const char* call) {
  return find(state().events, handle, call);
}

void work_through_queue(Stream& stream) {
  std::unique_lock lock(state().mutex);
  for (;;) {
    state().changed.wait(lock, [&] { return !stream.queue.empty() || stream.is_closed; });
    if (stream.queue.empty()) return;
    const std::function<void()> work = std::move(stream.queue.front());
    stream.queue.pop_front();
    lock.unlock();
    work();
    lock.lock();
    ++stream.finished;
    state().changed.notify_all();
  }
}

// Under the lock.
cudaError_t push(Stream& stream, std::function<void()> work) {
  if (const auto error = state().sticky[static_cast<std::size_t>(stream.device)]) return error;
  stream.queue.push_back(std::move(work));
  ++stream.enqueued;
  state().changed.notify_all();
  return cudaSuccess;
}

cudaError_t enqueue(Stream& stream, std::function<void()> work) {
  const std::lock_guard lock(state().mutex);
  return push(stream, std::move(work));
}

std::uint32_t* host_address(CUdeviceptr address) {
  const std::lock_guard lock(state().mutex);
  auto* data = reinterpret_cast<std::uint32_t*>(address - kMappedAt);
  if (is_inside(state().locks, data, sizeof *data)) return data;
  mistake("a value in memory that isn't mapped");
  return nullptr;
}

CUresult write_value(CUstream handle, CUdeviceptr address, cuuint32_t value, unsigned int flags) {
  if (const auto error = enter("cuStreamWriteValue32")) return static_cast<CUresult>(error);
  const auto stream = stream_of(handle, "cuStreamWriteValue32");
  auto* word = host_address(address);
  if (flags != CU_STREAM_WRITE_VALUE_DEFAULT) mistake("a value that may overtake bytes");
  if (stream == nullptr || word == nullptr) return CUDA_ERROR_INVALID_VALUE;
  return static_cast<CUresult>(enqueue(
      *stream, [word, value] { std::atomic_ref(*word).store(value, std::memory_order_release); }));
}

CUresult wait_value(CUstream handle, CUdeviceptr address, cuuint32_t value, unsigned int flags) {
  if (const auto error = enter("cuStreamWaitValue32")) return static_cast<CUresult>(error);
  const auto stream = stream_of(handle, "cuStreamWaitValue32");
  auto* word = host_address(address);
  if (flags != CU_STREAM_WAIT_VALUE_GEQ) mistake("a wait for something else than >=");
  if (stream == nullptr || word == nullptr) return CUDA_ERROR_INVALID_VALUE;
  return static_cast<CUresult>(enqueue(*stream, [word, value] {
    const auto now = [&] { return std::atomic_ref(*word).load(std::memory_order_acquire); };
    while (static_cast<std::int32_t>(now() - value) < 0) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }));
}

}  // namespace

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned int,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  if (const auto error = enter("cudaGetDriverEntryPointByVersion")) return error;
  const bool is_write = std::strcmp(name, "cuStreamWriteValue32") == 0;
  const bool is_wait = std::strcmp(name, "cuStreamWaitValue32") == 0;
  *found = is_write || is_wait ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  if (is_write) *function = reinterpret_cast<void*>(&write_value);
  if (is_wait) *function = reinterpret_cast<void*>(&wait_value);
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (const auto error = enter("cudaDeviceGetStreamPriorityRange")) return error;
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned int flags, int priority) {
  if (const auto error = enter("cudaStreamCreateWithPriority")) return error;
  if (flags != cudaStreamNonBlocking) mistake("a stream that waits for the default stream");
  if (priority != -5) mistake("a stream that isn't of the highest priority");
  auto stream = std::make_shared<Stream>();
  stream->device = current();
  stream->thread = std::thread([stream = stream.get()] { work_through_queue(*stream); });
  const std::lock_guard lock(state().mutex);
  *handle = reinterpret_cast<cudaStream_t>(++state().last_handle);
  state().streams[state().last_handle] = std::move(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const auto stream = stream_of(handle, "cudaStreamDestroy");
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  {
    const std::lock_guard lock(state().mutex);
    if (stream->finished < stream->enqueued)
      mistake("cudaStreamDestroy of a stream that has work left");
    stream->is_closed = true;
    state().streams.erase(reinterpret_cast<std::uintptr_t>(handle));
    state().changed.notify_all();
  }
  stream->thread.join();
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  if (const auto error = enter("cudaStreamSynchronize")) return error;
  check_relaxed("cudaStreamSynchronize");
  const auto stream = stream_of(handle, "cudaStreamSynchronize");
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  std::unique_lock lock(state().mutex);
  const std::uint64_t target = stream->enqueued;
  state().changed.wait(lock, [&] { return stream->finished >= target; });
  return state().sticky[static_cast<std::size_t>(stream->device)];
}

cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t handle) {
  if (const auto error = enter("cudaMemsetAsync")) return error;
  const auto stream = stream_of(handle, "cudaMemsetAsync");
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  return enqueue(*stream, [=] { std::memset(data, value, bytes); });
}

cudaError_t cudaMemcpyAsync(void* dst, const void* src, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t handle) {
  if (const auto error = enter("cudaMemcpyAsync")) return error;
  const auto stream = stream_of(handle, "cudaMemcpyAsync");
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  if (kind != cudaMemcpyHostToDevice) mistake("a copy that doesn't say host to device");
  {
    const std::lock_guard lock(state().mutex);
    if (!is_inside(state().locks, src, bytes)) {
      return mistake("cudaMemcpyAsync from memory that isn't page-locked");
    }
    if (!is_inside(state().allocations, dst, bytes)) {
      return mistake("cudaMemcpyAsync to memory that isn't allocated");
    }
  }
  const int device = stream->device;
  return enqueue(*stream, [=] {
    const cudaError_t error = enter("copy");
    const std::lock_guard lock(state().mutex);
    cudaError_t& sticky = state().sticky[static_cast<std::size_t>(device)];
    if (sticky == cudaSuccess) sticky = error;
    if (sticky == cudaSuccess) std::memcpy(dst, src, bytes);
  });
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned int flags) {
  if (const auto error = enter("cudaEventCreateWithFlags")) return error;
  if (flags != cudaEventDefault) mistake("an event without a time, or that sleeps");
  const std::lock_guard lock(state().mutex);
  *handle = reinterpret_cast<cudaEvent_t>(++state().last_handle);
  state().events[state().last_handle] = std::make_shared<Event>(Event{current(), nullptr});
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  if (event_of(handle, "cudaEventDestroy") == nullptr) return cudaErrorInvalidResourceHandle;
  const std::lock_guard lock(state().mutex);
  state().events.erase(reinterpret_cast<std::uintptr_t>(handle));
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  if (const auto error = enter("cudaEventRecord")) return error;
  const auto event = event_of(handle, "cudaEventRecord");
  const auto stream = stream_of(stream_handle, "cudaEventRecord");
  if (event == nullptr || stream == nullptr) return cudaErrorInvalidResourceHandle;
  auto record = std::make_shared<Record>();
  const std::lock_guard lock(state().mutex);
  const auto error = push(*stream, [record] {
    const std::lock_guard inner(state().mutex);
    record->time = std::chrono::steady_clock::now();
    record->is_done = true;
  });
  if (error == cudaSuccess) event->last = std::move(record);
  return error;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t handle, unsigned int) {
  if (const auto error = enter("cudaStreamWaitEvent")) return error;
  const auto event = event_of(handle, "cudaStreamWaitEvent");
  const auto stream = stream_of(stream_handle, "cudaStreamWaitEvent");
  if (event == nullptr || stream == nullptr) return cudaErrorInvalidResourceHandle;
  std::shared_ptr<Record> record;
  {
    const std::lock_guard lock(state().mutex);
    record = event->last;
  }
  if (record == nullptr) return cudaSuccess;
  return enqueue(*stream, [record] {
    std::unique_lock lock(state().mutex);
    state().changed.wait(lock, [&] { return record->is_done; });
  });
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  if (const auto error = enter("cudaEventQuery")) return error;
  check_relaxed("cudaEventQuery");
  const auto event = event_of(handle, "cudaEventQuery");
  if (event == nullptr) return cudaErrorInvalidResourceHandle;
  const std::lock_guard lock(state().mutex);
  if (const auto error = state().sticky[static_cast<std::size_t>(event->device)]) return error;
  return event->last == nullptr || event->last->is_done ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  if (const auto error = enter("cudaEventElapsedTime")) return error;
  const auto first = event_of(begin, "cudaEventElapsedTime");
  const auto second = event_of(end, "cudaEventElapsedTime");
  const std::lock_guard lock(state().mutex);
  if (first == nullptr || second == nullptr || first->last == nullptr || second->last == nullptr) {
    return mistake("cudaEventElapsedTime of an event that was never recorded");
  }
  if (!first->last->is_done || !second->last->is_done) return cudaErrorNotReady;
  const std::chrono::duration<float, std::milli> time = second->last->time - first->last->time;
  *milliseconds = time.count();
  return cudaSuccess;
}
