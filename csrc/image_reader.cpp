// SPDX-License-Identifier: Apache-2.0
#include <toppings/image_reader.h>

#include <condition_variable>
#include <exception>
#include <list>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"

namespace toppings {
namespace {

// One read, shared by its ticket and the thread that does it.
class Read {
 public:
  Read(std::string path, std::shared_ptr<const ModelShape> shape, std::chrono::nanoseconds patience)
      : path_(std::move(path)), shape_(std::move(shape)), patience_(patience) {}

  const ReadProgress& progress() const noexcept { return progress_; }

  bool is_done() const noexcept {
    const std::lock_guard lock(mutex_);
    return state_ == State::done;
  }

  std::shared_ptr<const Image> wait_for(std::chrono::nanoseconds timeout) {
    std::unique_lock lock(mutex_);
    const auto is_done = [this] { return state_ == State::done; };
    using Clock = std::chrono::steady_clock;
    const Clock::time_point now = Clock::now();
    const bool is_endless = timeout >= Clock::time_point::max() - now;
    const Clock::time_point deadline = is_endless ? Clock::time_point::max() : now + timeout;
    if (!done_.wait_until(lock, deadline, is_done)) return nullptr;
    if (error_ != nullptr) std::rethrow_exception(error_);
    return image_;
  }

  // One that hasn't begun ends here, so that nobody waits for the reads before it.
  void cancel() noexcept {
    const std::lock_guard lock(mutex_);
    progress_.cancel = true;
    if (state_ == State::queued) end(nullptr, cancelled());
  }

  // Nobody will ask for the image any more, so it isn't in use on behalf of this read.
  void drop() noexcept {
    std::shared_ptr<const Image> dropped;  // outlives the lock
    const std::lock_guard lock(mutex_);
    is_dropped_ = true;
    dropped = std::move(image_);
  }

  // Does nothing when it was cancelled before.
  void run(HostStore& store) noexcept {
    {
      const std::lock_guard lock(mutex_);
      if (state_ == State::done) return;
      state_ = State::running;
    }
    std::shared_ptr<const Image> image;
    std::exception_ptr error;
    try {
      image = read_image(store, path_, shape_, patience_, &progress_);
    } catch (...) {
      error = std::current_exception();
    }
    const std::lock_guard lock(mutex_);
    end(is_dropped_ ? nullptr : std::move(image), std::move(error));
  }

 private:
  enum class State : std::uint8_t { queued, running, done };

  void end(std::shared_ptr<const Image> image, std::exception_ptr error) noexcept {
    image_ = std::move(image);
    error_ = std::move(error);
    state_ = State::done;
    done_.notify_all();
  }

  std::exception_ptr cancelled() const noexcept {
    try {
      fail(Status::cancelled, path_, "to be read", "a cancellation");
    } catch (...) {
      return std::current_exception();
    }
  }

  const std::string path_;
  const std::shared_ptr<const ModelShape> shape_;
  const std::chrono::nanoseconds patience_;
  ReadProgress progress_;
  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable done_;
  State state_ = State::queued;
  bool is_dropped_ = false;
  std::shared_ptr<const Image> image_;
  std::exception_ptr error_;
};

class FileTicket final : public ReadTicket {
 public:
  explicit FileTicket(std::shared_ptr<Read> read) : read_(std::move(read)) {}
  ~FileTicket() override { read_->drop(); }
  FileTicket(const FileTicket&) = delete;
  FileTicket& operator=(const FileTicket&) = delete;

  std::int64_t bytes_read() const noexcept override { return read_->progress().bytes_read; }
  std::int64_t bytes_total() const noexcept override { return read_->progress().bytes_total; }
  bool is_done() const noexcept override { return read_->is_done(); }
  std::shared_ptr<const Image> wait_for(std::chrono::nanoseconds timeout) override {
    return read_->wait_for(timeout);
  }
  void cancel() noexcept override { read_->cancel(); }

 private:
  const std::shared_ptr<Read> read_;
};

}  // namespace

class ImageReader::Impl {
 public:
  Impl(std::shared_ptr<HostStore> store, int parallel_reads) : store_(std::move(store)) {
    try {
      for (int i = 0; i < parallel_reads; ++i) threads_.emplace_back([this] { work(); });
    } catch (const std::system_error& error) {
      stop();
      fail(Status::out_of_memory, "threads", std::to_string(parallel_reads), error.what());
    }
  }

  ~Impl() { stop(); }

  void add(std::shared_ptr<Read> read) {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(read));
    changed_.notify_one();
  }

 private:
  using Reads = std::list<std::shared_ptr<Read>>;

  void work() {
    Reads ended;  // destroyed without the mutex
    for (;;) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return is_stopping_ || !queue_.empty(); });
      if (is_stopping_) return;
      const auto self = queue_.begin();
      running_.splice(running_.end(), queue_, self);
      lock.unlock();
      (*self)->run(*store_);
      lock.lock();
      ended.splice(ended.end(), running_, self);
      lock.unlock();
      ended.clear();
    }
  }

  void stop() noexcept {
    Reads queued;
    {
      const std::lock_guard lock(mutex_);
      is_stopping_ = true;
      queued.swap(queue_);
      for (const std::shared_ptr<Read>& read : running_) read->cancel();
      changed_.notify_all();
    }
    for (const std::shared_ptr<Read>& read : queued) read->cancel();
    for (std::thread& thread : threads_) thread.join();
  }

  const std::shared_ptr<HostStore> store_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable changed_;
  bool is_stopping_ = false;
  Reads queue_;  // first come, first out
  Reads running_;
};

ImageReader::ImageReader(std::shared_ptr<HostStore> store, int parallel_reads) {
  if (store == nullptr) fail(Status::invalid_argument, "store", "a host store", "null");
  check_positive("parallel_reads", parallel_reads);
  impl_ = std::make_unique<Impl>(std::move(store), parallel_reads);
}

ImageReader::~ImageReader() = default;

std::shared_ptr<ReadTicket> ImageReader::read(std::string path,
                                              std::shared_ptr<const ModelShape> shape,
                                              std::chrono::nanoseconds patience) {
  const auto read = std::make_shared<Read>(std::move(path), std::move(shape), patience);
  auto ticket = std::make_shared<FileTicket>(read);
  impl_->add(read);
  return ticket;
}

}  // namespace toppings
