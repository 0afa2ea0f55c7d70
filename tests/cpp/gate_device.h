// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/device.h>
#include <toppings/error.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <variant>
#include <vector>

namespace toppings::testing {

// A device whose copies run only when the test says so, so that what is enqueued in between can be
// looked at without a clock. Records and waits run as soon as they are at the front of their
// stream. Time on the device is made up: a copy takes its bytes / kBytesPerSecond.
class GateDevice final : public Device {
 public:
  static constexpr double kBytesPerSecond = 1e9;

  struct Copy {
    int stream;  // numbered as they were made
    void* dst;
    const void* src;
    std::size_t bytes;
  };

  explicit GateDevice(DeviceKind kind = DeviceKind::host) : kind_(kind) {}

  // All copies so far in the order in which they were enqueued, whether they have run or not.
  std::vector<Copy> log() const {
    const std::lock_guard lock(core_->mutex);
    return core_->log;
  }

  // Copies enqueued in a stream and not run yet.
  std::vector<Copy> pending(int stream) const {
    const std::lock_guard lock(core_->mutex);
    std::vector<Copy> copies;
    for (const Work& work : core_->streams.at(static_cast<std::size_t>(stream)).queue) {
      if (const auto* copy = std::get_if<Copy>(&work)) copies.push_back(*copy);
    }
    return copies;
  }

  // Runs the oldest copy of a stream; false when there is none.
  bool complete(int stream) {
    const std::lock_guard lock(core_->mutex);
    return core_->complete(static_cast<std::size_t>(stream));
  }

  // From now on everything runs as it is enqueued.
  void open() {
    const std::lock_guard lock(core_->mutex);
    core_->is_open = true;
    core_->advance();
  }

  DeviceKind kind() const noexcept override { return kind_; }
  int index() const noexcept override { return 0; }
  std::string_view name() const noexcept override { return "a device behind a gate"; }
  bool is_in_place() const noexcept override { return false; }

  void* allocate(std::size_t bytes) override { return host_device()->allocate(bytes); }
  void deallocate(void* data, std::size_t bytes) noexcept override {
    host_device()->deallocate(data, bytes);
  }
  void* allocate_host(std::size_t bytes) override { return host_device()->allocate_host(bytes); }
  void deallocate_host(void* data, std::size_t bytes) noexcept override {
    host_device()->deallocate_host(data, bytes);
  }
  void page_lock(void*, std::size_t) override {}
  void page_unlock(void*) noexcept override {}
  void copy(void* device_dst, const void* host_src, std::size_t bytes) override {
    std::memcpy(device_dst, host_src, bytes);
  }

  std::unique_ptr<Stream> make_stream() override {
    const std::lock_guard lock(core_->mutex);
    core_->streams.emplace_back();
    return std::make_unique<GateStream>(core_, core_->streams.size() - 1);
  }
  std::unique_ptr<Event> make_event() override { return std::make_unique<GateEvent>(core_); }
  std::unique_ptr<Stream> wrap_stream(void*) override {
    throw Error(Status::unsupported, "wrap_stream: expected make_stream, got this");
  }

 private:
  struct Point {  // in a stream
    bool is_done = false;
    double seconds = 0;
  };
  struct Record {
    std::shared_ptr<Point> point;
  };
  struct Wait {
    std::shared_ptr<Point> point;
  };
  using Work = std::variant<Copy, Record, Wait>;

  // What streams and events share with the device.
  struct Core {
    struct Queue {
      std::deque<Work> queue;
      double seconds = 0;
    };

    bool complete(std::size_t stream) {
      Queue& own = streams.at(stream);
      const auto* copy = own.queue.empty() ? nullptr : std::get_if<Copy>(&own.queue.front());
      if (copy == nullptr) return false;
      std::memcpy(copy->dst, copy->src, copy->bytes);
      own.seconds += static_cast<double>(copy->bytes) / kBytesPerSecond;
      own.queue.pop_front();
      advance();
      return true;
    }

    bool run_front(Queue& own) {
      if (const auto* record = std::get_if<Record>(&own.queue.front())) {
        *record->point = {.is_done = true, .seconds = own.seconds};
      } else if (const auto* wait = std::get_if<Wait>(&own.queue.front())) {
        if (!wait->point->is_done) return false;
        own.seconds = std::max(own.seconds, wait->point->seconds);
      } else {
        if (!is_open) return false;
        const Copy& copy = std::get<Copy>(own.queue.front());
        std::memcpy(copy.dst, copy.src, copy.bytes);
        own.seconds += static_cast<double>(copy.bytes) / kBytesPerSecond;
      }
      own.queue.pop_front();
      return true;
    }

    void advance() {
      for (bool moved = true; moved;) {
        moved = false;
        for (Queue& own : streams) {
          while (!own.queue.empty() && run_front(own)) moved = true;
        }
      }
      changed.notify_all();
    }

    void enqueue(std::size_t stream, Work work) {
      if (const auto* copy = std::get_if<Copy>(&work)) log.push_back(*copy);
      streams[stream].queue.push_back(std::move(work));
      advance();
    }

    std::mutex mutex;
    std::condition_variable changed;
    std::vector<Queue> streams;
    std::vector<Copy> log;
    bool is_open = false;
  };

  class GateStream;

  class GateEvent final : public Event {
   public:
    explicit GateEvent(std::shared_ptr<Core> core) : core_(std::move(core)) {}

    bool is_done() const override {
      const std::lock_guard lock(core_->mutex);
      return point_->is_done;
    }
    bool wait_for(std::chrono::nanoseconds timeout) const override {
      std::unique_lock lock(core_->mutex);
      const std::shared_ptr<Point> point = point_;
      return core_->changed.wait_for(lock, timeout, [&] { return point->is_done; });
    }
    double seconds_since(const Event& earlier) const override {
      const std::lock_guard lock(core_->mutex);
      return point_->seconds - dynamic_cast<const GateEvent&>(earlier).point_->seconds;
    }

   private:
    friend class GateDevice::GateStream;
    std::shared_ptr<Core> core_;
    std::shared_ptr<Point> point_ = std::make_shared<Point>(Point{.is_done = true});
  };

  class GateStream final : public Stream {
   public:
    GateStream(std::shared_ptr<Core> core, std::size_t index)
        : core_(std::move(core)), index_(index) {}
    ~GateStream() override { synchronize(); }

    void copy(void* device_dst, const void* host_src, std::size_t bytes) override {
      const std::lock_guard lock(core_->mutex);
      core_->enqueue(index_, Copy{static_cast<int>(index_), device_dst, host_src, bytes});
    }
    void record(Event& event) override {
      const std::lock_guard lock(core_->mutex);
      auto& own = dynamic_cast<GateEvent&>(event);
      own.point_ = std::make_shared<Point>();
      core_->enqueue(index_, Record{own.point_});
    }
    void wait(const Event& event) override {
      const std::lock_guard lock(core_->mutex);
      core_->enqueue(index_, Wait{dynamic_cast<const GateEvent&>(event).point_});
    }
    void write_value(std::uint32_t*, std::uint32_t) override {
      throw Error(Status::unsupported, "write_value: expected copies, got this");
    }
    void wait_value(const std::uint32_t*, std::uint32_t) override {
      throw Error(Status::unsupported, "wait_value: expected copies, got this");
    }
    void synchronize() override {
      std::unique_lock lock(core_->mutex);
      core_->changed.wait(lock, [&] { return core_->streams[index_].queue.empty(); });
    }
    void* native() const noexcept override { return nullptr; }

   private:
    std::shared_ptr<Core> core_;
    std::size_t index_;
  };

  const std::shared_ptr<Core> core_ = std::make_shared<Core>();
  DeviceKind kind_;
};

}  // namespace toppings::testing
