// SPDX-License-Identifier: Apache-2.0
// Workers in a process of their own, and what becomes of tasks when it stops, hangs or dies.

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <toppings/device.h>
#include <unistd.h>

#include <memory>

#include "assist_testing.h"

extern char** environ;

namespace toppings::assist {
namespace {

std::string unique_name() {
  static int count = 0;
  return "/toppings-test-" + std::to_string(getpid()) + "-" + std::to_string(++count);
}

bool exists(const std::string& name) {
  const int fd = shm_open(name.c_str(), O_RDONLY, 0);
  if (fd >= 0) close(fd);
  return fd >= 0;
}

// toppings-assist; killed at the end if it still runs.
class Process {
 public:
  explicit Process(std::vector<std::string> words) {
    words.insert(words.begin(), TOPPINGS_ASSIST);
    std::vector<char*> pointers;
    for (std::string& word : words) pointers.push_back(word.data());
    pointers.push_back(nullptr);
    EXPECT_EQ(posix_spawn(&pid_, TOPPINGS_ASSIST, nullptr, nullptr, pointers.data(), environ), 0);
  }
  ~Process() {
    if (pid_ == 0) return;
    kill(pid_, SIGKILL);
    wait();
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void signal(int number) const { kill(pid_, number); }

  // Returns when no thread of it runs any more.
  void stop() const {
    signal(SIGSTOP);
    waitpid(pid_, nullptr, WUNTRACED);
  }

  // The exit status; minus a signal's number.
  int wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    pid_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  }

 private:
  pid_t pid_ = 0;
};

// A store whose memory another process can map, an image in it, and a channel.
class AssistProcess : public ::testing::Test {
 protected:
  std::unique_ptr<Process> start() const {
    const std::string file =
        "/proc/" + std::to_string(getpid()) + "/fd/" + std::to_string(store_.region_file());
    return std::make_unique<Process>(std::vector<std::string>{
        "--channel", name_, "--region", file, "--cores", "-1,-1", "--tokens-per-core", "4"});
  }

  std::unique_ptr<Process> start_and_wait() const {
    auto process = start();
    EXPECT_TRUE(eventually([&] { return channel_->has_workers(kLong); }));
    return process;
  }

  void expect_right(Submission submission) const {
    EXPECT_TRUE(has_deltas(*channel_, submission, want_));
  }

  static constexpr int kTokens = 40;
  HostStore store_{host_device(), 1 << 20, true};
  std::shared_ptr<const Image> image_ = testing::add_image(
      store_, AdapterLayout(testing::small_shape(), DType::bf16, {{8, 3}, {}, {2}}), "digest");
  const Region region_{store_.region().data(), std::ssize(store_.region())};
  const std::vector<Region> regions_{region_};
  const Task task_ = make_task(*image_, 0, 0, 2, kTokens, DType::bf16, region_, 0);
  std::mt19937_64 random_{5};
  const std::vector<std::byte> x_ =
      testing::as_dtype(testing::random_floats(kTokens * 24, random_), DType::bf16);
  const std::vector<std::byte> want_ = operators_deltas(task_, x_.data(), region_);
  const std::string name_ = unique_name();
  std::unique_ptr<Channel> channel_ = std::make_unique<Channel>(kGeometry, name_);
};

TEST_F(AssistProcess, ComputesOnTheStoresOwnBytes) {
  auto process = start_and_wait();
  for (int i = 0; i < 10; ++i) {
    const Submission submission = submit(*channel_, task_, x_.data(), image_);
    ASSERT_EQ(channel_->await(submission, kLong), Outcome::done);
    expect_right(submission);
    channel_->release(submission);
  }
  // Built while the worker has the region mapped.
  const auto late = testing::add_image(store_, image_->layout(), "another", 9);
  const Task task = make_task(*late, 0, 0, 2, kTokens, DType::bf16, region_, 0);
  const Submission submission = submit(*channel_, task, x_.data(), late);
  ASSERT_EQ(channel_->await(submission, kLong), Outcome::done);
  EXPECT_TRUE(has_deltas(*channel_, submission, operators_deltas(task, x_.data(), region_)));
  process->signal(SIGTERM);
  EXPECT_EQ(process->wait(), 0);
  EXPECT_FALSE(channel_->has_workers());
  EXPECT_FALSE(channel_->submit(task_, x_.data(), 24));
}

TEST_F(AssistProcess, EndsWithItsEngine) {
  auto process = start_and_wait();
  channel_.reset();
  EXPECT_EQ(process->wait(), 0);
  EXPECT_FALSE(exists(name_));
}

TEST_F(AssistProcess, AKilledWorkerIsFoundOutAndReplaced) {
  auto process = start_and_wait();
  process->stop();  // so that it can't be faster
  const Submission submission = submit(*channel_, task_, x_.data(), image_);
  process->signal(SIGKILL);
  EXPECT_EQ(channel_->await(submission, kLong), Outcome::gone);
  EXPECT_FALSE(channel_->has_workers());
  EXPECT_FALSE(channel_->submit(task_, x_.data(), 24));
  channel_->redo(submission, regions_);
  EXPECT_EQ(channel_->await(submission, kLong), Outcome::done);
  expect_right(submission);
  channel_->release(submission);
  EXPECT_EQ(channel_->stats().free, 4);

  const auto next = start_and_wait();
  const Submission again = submit(*channel_, task_, x_.data(), image_);
  ASSERT_EQ(channel_->await(again, kLong), Outcome::done);
  expect_right(again);
}

// The engine has not noticed the death when the next one comes: what was left is left alone.
TEST_F(AssistProcess, ASuccessorLeavesOldTasksToTheEngine) {
  auto process = start_and_wait();
  process->stop();
  const Submission submission = submit(*channel_, task_, x_.data(), image_);
  process->signal(SIGKILL);
  process->wait();
  const auto next = start();
  EXPECT_TRUE(
      eventually([&] { return channel_->await(submission, milliseconds(1)) == Outcome::gone; }));
  channel_->redo(submission, regions_);
  expect_right(submission);
  channel_->release(submission);
}

TEST_F(AssistProcess, AStalledWorkersLateResultChangesNothing) {
  auto process = start_and_wait();
  process->stop();
  std::vector<Submission> submissions;
  for (int i = 0; i < 4; ++i) submissions.push_back(submit(*channel_, task_, x_.data(), image_));
  for (const Submission& submission : submissions) {
    EXPECT_EQ(channel_->await(submission, milliseconds(20)), Outcome::timed_out);
  }
  EXPECT_TRUE(eventually([&] { return !channel_->has_workers(milliseconds(200)); }));
  EXPECT_TRUE(channel_->has_workers());  // it lives, though
  for (const Submission& submission : submissions) channel_->redo(submission, regions_);

  const std::weak_ptr<const Image> watch = image_;
  image_.reset();
  store_.erase("digest");
  for (std::size_t i = 1; i < 4; ++i) channel_->release(submissions[i]);
  EXPECT_EQ(channel_->stats().quarantined, 3);  // none of them is used again
  EXPECT_FALSE(channel_->submit(task_, x_.data(), 24));
  EXPECT_FALSE(watch.expired());

  process->signal(SIGCONT);
  EXPECT_TRUE(eventually([&] { return channel_->stats().free == 3; }));
  ASSERT_EQ(channel_->await(submissions[0], kLong), Outcome::done);
  expect_right(submissions[0]);  // the engine's, untouched by what came later
  EXPECT_EQ(channel_->deltas(submissions[0]), channel_->deltas(submissions[0], true));
  channel_->release(submissions[0]);
  EXPECT_TRUE(eventually([&] { return channel_->stats().free == 4 && watch.expired(); }));
}

TEST_F(AssistProcess, ManyDeaths) {
  std::unique_ptr<Process> process;
  int redone = 0;
  for (int i = 0; i < 100; ++i) {
    if (process == nullptr) process = start_and_wait();
    const Submission submission = submit(*channel_, task_, x_.data(), image_);
    if (i % 10 == 9) process.reset();  // in the middle, before or after
    if (channel_->await(submission, kLong) != Outcome::done) {
      channel_->redo(submission, regions_);
      ++redone;
    }
    expect_right(submission);
    channel_->release(submission);
  }
  EXPECT_EQ(channel_->stats().free, 4);
  EXPECT_LE(redone, 10);
}

TEST_F(AssistProcess, NobodyElseMayServe) {
  auto process = start_and_wait();
  TOPPINGS_EXPECT_ERROR(Workers(*channel_, regions_, {.cores = {-1}}), invalid_argument);
  EXPECT_EQ(start()->wait(), 1);
  process->signal(SIGTERM);
  EXPECT_EQ(process->wait(), 0);
  {
    const Workers here(*channel_, regions_, {.cores = {-1}});
    EXPECT_TRUE(channel_->has_workers());
    EXPECT_EQ(start()->wait(), 1);
  }
  const auto next = start_and_wait();
}

TEST_F(AssistProcess, BadArguments) {
  EXPECT_EQ(Process({}).wait(), 2);
  EXPECT_EQ(Process({"--channel"}).wait(), 2);
  EXPECT_EQ(Process({"--channel", name_, "--cores", "1,x"}).wait(), 2);
  EXPECT_EQ(Process({"--channel", name_ + "x", "--cores", "-1"}).wait(), 1);
  EXPECT_EQ(Process({"--channel", name_, "--cores", "-1", "--region", "/nowhere"}).wait(), 1);
  EXPECT_EQ(Process({"--channel", name_, "--cores", "1000000"}).wait(), 1);
}

TEST(AssistMemory, IsExhausted) {
  struct statvfs status;
  ASSERT_EQ(statvfs("/dev/shm", &status), 0);
  const auto all = static_cast<std::int64_t>(status.f_blocks * status.f_frsize);
  if (all == 0) GTEST_SKIP() << "/dev/shm has no limit";
  const std::string name = unique_name();
  TOPPINGS_EXPECT_ERROR(Channel({.num_slots = 2, .x_bytes = all, .deltas_bytes = 64}, name),
                        out_of_memory);
  EXPECT_FALSE(exists(name));
}

TEST(AssistMemory, NamesAreCheckedAndGone) {
  const std::string name = unique_name();
  {
    const Channel channel(kGeometry, name);
    EXPECT_TRUE(exists(name));
    TOPPINGS_EXPECT_ERROR(Channel(kGeometry, name), invalid_argument);
  }
  EXPECT_FALSE(exists(name));
  for (const char* wrong : {"toppings", "/", "/a/b"}) {
    TOPPINGS_EXPECT_ERROR(Channel(kGeometry, wrong), invalid_argument);
  }
}

TEST(AssistMemory, ForeignBytesAreNoChannel) {
  const std::string name = unique_name();
  const int fd = shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600);
  ASSERT_GE(fd, 0);
  const WorkersOptions options{.cores = {-1}};
  TOPPINGS_EXPECT_ERROR(Workers(name, {}, options), not_found);  // empty
  ASSERT_EQ(ftruncate(fd, 64), 0);
  TOPPINGS_EXPECT_ERROR(Workers(name, {}, options), format);
  ASSERT_EQ(ftruncate(fd, 1 << 20), 0);
  TOPPINGS_EXPECT_ERROR(Workers(name, {}, options), format);
  {
    const std::string real = unique_name();
    const Channel channel(kGeometry, real);
    ASSERT_EQ(pwrite(fd, channel.memory().data(), 64, 0), 64);  // cut off after the header
    ASSERT_EQ(ftruncate(fd, 4096), 0);
    TOPPINGS_EXPECT_ERROR(Workers(name, {}, options), format);
  }
  close(fd);
  shm_unlink(name.c_str());
}

// A process that dies leaves the name behind: its workers tidy up.
TEST(AssistMemory, WorkersRemoveTheNameOfADeadEnginesChannel) {
  const std::string name = unique_name();
  const pid_t engine = fork();
  if (engine == 0) {
    const Channel channel(kGeometry, name);
    for (;;) pause();
  }
  std::unique_ptr<Workers> workers;
  ASSERT_TRUE(eventually([&] {
    try {
      workers = std::make_unique<Workers>(name, std::vector<std::string>{},
                                          WorkersOptions{.cores = {-1}});
    } catch (const Error&) {
    }
    return workers != nullptr;
  }));
  EXPECT_FALSE(workers->is_engine_gone());
  kill(engine, SIGKILL);
  EXPECT_TRUE(eventually([&] { return workers->is_engine_gone(); }));
  EXPECT_TRUE(exists(name));
  workers.reset();
  EXPECT_FALSE(exists(name));
  waitpid(engine, nullptr, 0);
}

}  // namespace
}  // namespace toppings::assist
