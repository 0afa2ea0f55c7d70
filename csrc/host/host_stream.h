// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <variant>

#include "host/host_event.h"
#include "host/host_link.h"
#include "host/spin.h"

namespace toppings {

// A thread that works through a queue in order. When something fails, nothing after it runs, and
// every record after it fails.
//
// The stream has a clock of its own, which its records take their times from: without a link it is
// the time of day; with one a copy ends when the link says so, however late the thread notices.
class HostStream final : public Stream {
 public:
  // link: null for plain memcpy. The thread is pinned to core cpu, -1: to none.
  HostStream(const Device& device, std::shared_ptr<SharedLink> link, int cpu);
  ~HostStream() override;

  void copy(void* device_dst, const void* host_src, std::size_t bytes) override;
  void record(Event& event) override;
  void wait(const Event& event) override;
  void write_value(std::uint32_t* address, std::uint32_t value) override;
  void wait_value(const std::uint32_t* address, std::uint32_t value) override;
  void synchronize() override;
  void* native() const noexcept override { return nullptr; }

 private:
  struct Copy {
    void* dst;
    const void* src;
    std::size_t bytes;
  };
  struct Record {
    std::shared_ptr<HostRecord> record;
  };
  struct Wait {
    std::shared_ptr<HostRecord> record;
  };
  struct WriteValue {
    std::uint32_t* address;
    std::uint32_t value;
  };
  struct WaitValue {
    const std::uint32_t* address;
    std::uint32_t value;
  };
  using Work = std::variant<Copy, Record, Wait, WriteValue, WaitValue>;
  struct Item {
    Work work;
    SteadyTime enqueued;
  };

  void enqueue(Work work);
  bool complete_at_once(HostRecord& record);
  bool take(Item& item);
  void work_through_queue(int cpu);
  void run(const Copy& copy);
  void run(const Record& record);
  void run(const Wait& wait);
  void run(const WriteValue& write);
  void run(const WaitValue& wait);
  void pass_wait();

  const Device* device_;
  std::shared_ptr<SharedLink> link_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;
  std::atomic<std::size_t> size_{0};  // of the queue, to look at without the lock
  std::size_t waits_ = 0;             // in the queue or being waited for
  bool sleeps_ = false;               // the thread does
  bool works_ = true;  // the thread has taken something and is not through, or has yet to look
  bool closed_ = false;
  LinkLane lane_;  // its copies before the first wait; guarded by the link

  // The thread's own while it works.
  SteadyTime clock_;
  std::string failure_;  // empty: none

  std::thread thread_;
};

// The thread that calls. Thread-safe as the device is.
class CallingThread final : public Stream {
 public:
  CallingThread(const Device& device, std::shared_ptr<SharedLink> link);

  void copy(void* device_dst, const void* host_src, std::size_t bytes) override;
  void record(Event& event) override;
  void wait(const Event& event) override;
  void write_value(std::uint32_t* address, std::uint32_t value) override;
  void wait_value(const std::uint32_t* address, std::uint32_t value) override;
  void synchronize() override {}
  void* native() const noexcept override { return nullptr; }

 private:
  const Device* device_;
  std::shared_ptr<SharedLink> link_;
};

// By memcpy, or over the link when there is one; done when it returns.
void copy_now(SharedLink* link, void* dst, const void* src, std::size_t bytes);

}  // namespace toppings
