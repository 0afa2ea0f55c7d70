// SPDX-License-Identifier: Apache-2.0
#include "host/host_stream.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <limits>
#include <system_error>
#include <utility>

#include "check.h"
#include "host/affinity.h"
#include "host/host_value.h"

namespace toppings {

void copy_now(SharedLink* link, void* dst, const void* src, std::size_t bytes) {
  if (link == nullptr) {
    std::memcpy(dst, src, bytes);
    return;
  }
  LinkLane lane;
  link->begin(lane, bytes);
  link->finish(lane, dst, src, bytes);
}

HostStream::HostStream(const Device& device, std::shared_ptr<SharedLink> link, int cpu)
    : device_(&device), link_(std::move(link)) {
  try {
    thread_ = std::thread([this, cpu] { work_through_queue(cpu); });
  } catch (const std::system_error& error) {
    fail(Status::device_failed, "a stream's thread", "one more", error.what());
  }
}

HostStream::~HostStream() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  changed_.notify_one();
  thread_.join();
  if (link_ != nullptr) link_->remove(lane_);  // a failed stream leaves copies there
}

void HostStream::copy(void* device_dst, const void* host_src, std::size_t bytes) {
  enqueue(Copy{device_dst, host_src, bytes});
}

void HostStream::record(Event& event) {
  HostEvent& own = host_event(event, *device_);
  auto record = std::make_shared<HostRecord>();
  if (!complete_at_once(*record)) enqueue(Record{record});
  own.set_last(std::move(record));
}

// Nothing is before it, so the thread needn't be woken for it.
bool HostStream::complete_at_once(HostRecord& record) {
  const std::lock_guard lock(mutex_);
  if (!queue_.empty() || works_ || !failure_.empty()) return false;
  record.complete(std::max(clock_, steady_now()));
  return true;
}

void HostStream::wait(const Event& event) {
  auto record = host_event(event, *device_).last();
  if (record != nullptr && !record->has_succeeded()) enqueue(Wait{std::move(record)});
}

void HostStream::write_value(std::uint32_t* address, std::uint32_t value) {
  enqueue(WriteValue{address, value});
}

void HostStream::wait_value(const std::uint32_t* address, std::uint32_t value) {
  enqueue(WaitValue{address, value});
}

void HostStream::synchronize() {
  auto record = std::make_shared<HostRecord>();
  enqueue(Record{record});
  record->wait_until(SteadyTime::max());
}

void HostStream::enqueue(Work work) {
  bool wake = false;
  {
    const std::lock_guard lock(mutex_);
    if (const auto* copy = std::get_if<Copy>(&work)) {
      if (link_ != nullptr && waits_ == 0) link_->begin(lane_, copy->bytes);
    } else if (std::holds_alternative<Wait>(work) || std::holds_alternative<WaitValue>(work)) {
      ++waits_;
    }
    queue_.push_back({std::move(work), steady_now()});
    size_.store(queue_.size(), std::memory_order_relaxed);
    wake = std::exchange(sleeps_, false);
  }
  if (wake) changed_.notify_one();
}

// False when the stream is closed and nothing is left.
bool HostStream::take(Item& item) {
  {
    const std::lock_guard lock(mutex_);
    works_ = !queue_.empty();
  }
  spin_until(steady_now() + kSpin, [&] { return size_.load(std::memory_order_relaxed) > 0; });
  std::unique_lock lock(mutex_);
  while (queue_.empty()) {
    if (closed_) return false;
    sleeps_ = true;
    changed_.wait(lock);
  }
  item = std::move(queue_.front());
  queue_.pop_front();
  works_ = true;
  size_.store(queue_.size(), std::memory_order_relaxed);
  return true;
}

void HostStream::work_through_queue(int cpu) {
  try {
    pin_this_thread(cpu);
  } catch (const Error& error) {
    failure_ = error.what();
  }
  Item item;
  while (take(item)) {
    clock_ = std::max(clock_, item.enqueued);
    std::visit([this](const auto& work) { run(work); }, item.work);
  }
}

void HostStream::run(const Copy& copy) {
  if (!failure_.empty()) return;
  if (link_ != nullptr) {
    clock_ = std::max(clock_, link_->finish(lane_, copy.dst, copy.src, copy.bytes));
  } else {
    std::memcpy(copy.dst, copy.src, copy.bytes);
    clock_ = steady_now();
  }
}

void HostStream::run(const Record& record) {
  if (failure_.empty()) {
    record.record->complete(clock_);
  } else {
    record.record->fail(failure_);
  }
}

void HostStream::run(const Wait& wait) {
  if (!failure_.empty()) return;
  try {
    wait.record->wait_until(SteadyTime::max());
  } catch (const Error& error) {
    failure_ = error.what();
    return;
  }
  clock_ = std::max(clock_, wait.record->time());
  pass_wait();
}

void HostStream::run(const WriteValue& write) {
  if (failure_.empty()) write_host_value(write.address, write.value);
}

void HostStream::run(const WaitValue& wait) {
  if (!failure_.empty()) return;
  wait_host_value(wait.address, wait.value);
  clock_ = steady_now();
  pass_wait();
}

// The copies up to the next wait take to the link.
void HostStream::pass_wait() {
  const std::lock_guard lock(mutex_);
  --waits_;
  if (link_ == nullptr) return;
  for (const Item& item : queue_) {
    if (std::holds_alternative<Wait>(item.work) || std::holds_alternative<WaitValue>(item.work)) {
      break;
    }
    if (const auto* copy = std::get_if<Copy>(&item.work)) link_->begin(lane_, copy->bytes);
  }
}

CallingThread::CallingThread(const Device& device, std::shared_ptr<SharedLink> link)
    : device_(&device), link_(std::move(link)) {}

void CallingThread::copy(void* device_dst, const void* host_src, std::size_t bytes) {
  copy_now(link_.get(), device_dst, host_src, bytes);
}

void CallingThread::record(Event& event) {
  HostEvent& own = host_event(event, *device_);
  auto record = std::make_shared<HostRecord>();
  record->complete(steady_now());
  own.set_last(std::move(record));
}

void CallingThread::wait(const Event& event) {
  const auto record = host_event(event, *device_).last();
  if (record != nullptr) record->wait_until(SteadyTime::max());
}

void CallingThread::write_value(std::uint32_t* address, std::uint32_t value) {
  write_host_value(address, value);
}

void CallingThread::wait_value(const std::uint32_t* address, std::uint32_t value) {
  wait_host_value(address, value);
}

}  // namespace toppings
