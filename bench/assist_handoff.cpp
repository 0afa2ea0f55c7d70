// SPDX-License-Identifier: Apache-2.0
// What it costs to hand work to CPU workers: a flag, a whole task, tasks with payloads, beside a
// pipe and a UNIX socket; and how the computation scales with threads. Engine on the first core
// given, workers on the others. Prints a table.

#include <immintrin.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <toppings/assist/workers.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

namespace assist = toppings::assist;
using Clock = std::chrono::steady_clock;

constexpr int kHidden = 4096;
constexpr auto kLong = std::chrono::seconds(10);

int engine_core = 0, worker_core = 1;

void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<unsigned>(core), &set);
  sched_setaffinity(0, sizeof set, &set);
}

struct Times {
  double median, p99, best;  // us
};

// Of f(), after a tenth of the rounds more that don't count; before(), not timed, each time.
template <class Before, class F>
Times measure(int rounds, Before before, F f) {
  std::vector<double> times;
  for (int i = -rounds / 10; i < rounds; ++i) {
    before();
    const auto start = Clock::now();
    f();
    const double us = std::chrono::duration<double, std::micro>(Clock::now() - start).count();
    if (i >= 0) times.push_back(us);
  }
  std::ranges::sort(times);
  return {times[times.size() / 2], times[times.size() * 99 / 100], times.front()};
}

template <class F>
Times measure(int rounds, F f) {
  return measure(rounds, [] {}, f);
}

// A child that runs f() on the workers' core until it is killed.
class Child {
 public:
  template <class F>
  explicit Child(F f) : pid_(fork()) {
    if (pid_ != 0) return;
    pin(worker_core);
    f();
    _exit(0);
  }
  ~Child() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

 private:
  pid_t pid_;
};

// ---- flags

struct Flags {
  alignas(64) std::atomic<std::uint32_t> request{0};
  alignas(64) std::atomic<std::uint32_t> reply{0};
};

void echo(Flags& flags, const std::atomic<bool>* stops) {
  for (std::uint32_t epoch = 1;; ++epoch) {
    while (flags.request.load(std::memory_order_acquire) != epoch) {
      if (stops != nullptr && stops->load(std::memory_order_relaxed)) return;
      _mm_pause();
    }
    flags.reply.store(epoch, std::memory_order_release);
  }
}

// A thousand at a time: one alone takes less than two looks at the clock.
Times measure_flags(Flags& flags) {
  constexpr int kBatch = 1000;
  std::uint32_t epoch = 0;
  const Times batch = measure(1000, [&] {
    for (int i = 0; i < kBatch; ++i) {
      flags.request.store(++epoch, std::memory_order_release);
      while (flags.reply.load(std::memory_order_acquire) != epoch) _mm_pause();
    }
  });
  return {batch.median / kBatch, batch.p99 / kBatch, batch.best / kBatch};
}

Times flags_between_threads() {
  Flags flags;
  std::atomic<bool> stops = false;
  std::thread worker([&] {
    pin(worker_core);
    echo(flags, &stops);
  });
  const Times times = measure_flags(flags);
  stops = true;
  worker.join();
  return times;
}

Times flags_between_processes() {
  void* memory =
      mmap(nullptr, sizeof(Flags), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  Flags& flags = *new (memory) Flags;
  Times times;
  {
    const Child worker([&] { echo(flags, nullptr); });
    times = measure_flags(flags);
  }
  munmap(memory, sizeof(Flags));
  return times;
}

// ---- tasks

// q, k and v; rank 0: nothing to compute, the deltas are only zeroed.
assist::Task make_task(int tokens, int in, int out, int rank, const std::byte* weights) {
  assist::Task task{};
  task.tokens = tokens;
  task.in = in;
  task.num_projections = 3;
  task.dtype = task.weight_dtype = toppings::DType::bf16;
  std::int64_t at = reinterpret_cast<std::intptr_t>(weights);
  for (std::size_t s = 0; s < 3; ++s) {
    assist::TaskProjection& p = task.projections[s];
    p.a_offset = at;
    p.b_offset = at + std::int64_t{2} * rank * in;
    at = p.b_offset + std::int64_t{2} * rank * out;
    p.rank = rank;
    p.out = out;
    p.scale = 1;
  }
  return task;
}

void run(assist::Channel& channel, const assist::Task& task, const void* x) {
  const auto submission = channel.submit(task, x, task.in);
  if (!submission || channel.await(*submission, kLong) != assist::Outcome::done) {
    throw std::runtime_error("no worker answers");
  }
  channel.release(*submission);
}

// f(channel) with one worker that spins so long, in a thread or in another process.
Times with_worker(bool is_process, std::chrono::microseconds spin,
                  const std::function<Times(assist::Channel&)>& f) {
  const std::string name =
      is_process ? "/toppings-handoff-" + std::to_string(getpid()) : std::string();
  assist::Channel channel(
      {.num_slots = 4, .x_bytes = 2 * 256 * kHidden, .deltas_bytes = 3 * 2 * 256 * kHidden}, name);
  const assist::WorkersOptions options{
      .cores = {worker_core}, .tokens_per_core = 256, .spin = spin};
  if (!is_process) {
    const assist::Workers workers(channel, {assist::kWholeAddressSpace}, options);
    return f(channel);
  }
  const Child worker([&] {
    const assist::Workers workers(name, {name}, options);  // any region: no weights are read
    for (;;) pause();
  });
  while (!channel.has_workers()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  return f(channel);
}

Times measure_tasks(bool is_process, int tokens) {
  return with_worker(is_process, std::chrono::seconds(1), [&](assist::Channel& channel) {
    const std::vector<std::byte> x(static_cast<std::size_t>(2 * tokens) * kHidden);
    const assist::Task task = tokens == 0 ? make_task(1, 1, 1, 0, nullptr)
                                          : make_task(tokens, kHidden, kHidden, 0, nullptr);
    const std::vector<std::byte> row(64);
    return measure(tokens > 16 ? 300 : 20000,
                   [&] { run(channel, task, tokens == 0 ? row.data() : x.data()); });
  });
}

Times measure_sleeping(bool is_process) {
  return with_worker(is_process, std::chrono::microseconds(0), [](assist::Channel& channel) {
    const std::vector<std::byte> row(64);
    const assist::Task task = make_task(1, 1, 1, 0, nullptr);
    return measure(
        300, [] { std::this_thread::sleep_for(std::chrono::milliseconds(2)); },
        [&] { run(channel, task, row.data()); });
  });
}

// ---- pipe and socket

void read_all(int fd, std::byte* data, std::size_t bytes) {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t got = read(fd, data + done, bytes - done);
    if (got <= 0) _exit(1);
    done += static_cast<std::size_t>(got);
  }
}

void write_all(int fd, const std::byte* data, std::size_t bytes) {
  for (std::size_t done = 0; done < bytes;) {
    const ssize_t put = write(fd, data + done, bytes - done);
    if (put <= 0) _exit(1);
    done += static_cast<std::size_t>(put);
  }
}

// `there` bytes there and `back` bytes back.
Times measure_bytes(bool is_socket, std::size_t there, std::size_t back, int rounds) {
  int to[2], from[2];
  if (is_socket) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0) return {};
    to[0] = from[1] = pair[1];
    to[1] = from[0] = pair[0];
  } else if (pipe(to) != 0 || pipe(from) != 0) {
    return {};
  }
  Times times;
  {
    const Child worker([&] {
      std::vector<std::byte> in(there), out(back);
      for (;;) {
        read_all(to[0], in.data(), there);
        write_all(from[1], out.data(), back);
      }
    });
    std::vector<std::byte> out(there), in(back);
    times = measure(rounds, [&] {
      write_all(to[1], out.data(), there);
      read_all(from[0], in.data(), back);
    });
  }
  for (const int fd : {to[0], to[1], from[0], from[1]}) close(fd);
  return times;
}

// ---- the computation

// A task, two under way; workers on `cores`.
Times measure_compute(const std::vector<int>& cores, int tokens, int rank) {
  const std::size_t elements = std::size_t{6} * static_cast<std::size_t>(rank) * kHidden;
  std::vector<std::uint16_t> weights(elements, 0x3C00),
      x(static_cast<std::size_t>(tokens) * kHidden, 0x3C00);
  assist::Channel channel({.num_slots = 2,
                           .x_bytes = std::int64_t{2} * tokens * kHidden,
                           .deltas_bytes = std::int64_t{6} * tokens * kHidden});
  const assist::Workers workers(channel, {assist::kWholeAddressSpace},
                                {.cores = cores, .tokens_per_core = 16});
  const assist::Task task =
      make_task(tokens, kHidden, kHidden, rank, reinterpret_cast<const std::byte*>(weights.data()));
  const Times times = measure(100, [&] {
    const auto one = channel.submit(task, x.data(), kHidden);
    const auto two = channel.submit(task, x.data(), kHidden);
    channel.await(one.value(), kLong);
    channel.await(two.value(), kLong);
    channel.release(*one);
    channel.release(*two);
  });
  return {times.median / 2, times.p99 / 2, times.best / 2};
}

void print(const char* what, Times times, double parts = 1) {
  std::printf("%-58s %9.2f %9.2f\n", what, times.median / parts, times.p99 / parts);
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** words) try {
  std::vector<int> cores{0, 1};
  if (count > 1) {
    cores.clear();
    for (int i = 1; i < count; ++i) cores.push_back(std::atoi(words[i]));
  }
  if (cores.size() < 2) {
    std::fputs("usage: assist_handoff [ENGINE_CORE WORKER_CORE...]\n", stderr);
    return 2;
  }
  engine_core = cores[0];
  worker_core = cores[1];
  pin(engine_core);

  std::printf("%-58s %9s %9s\n", "microseconds", "median", "p99");
  print("a flag, one way, threads (mean of 1000)", flags_between_threads(), 2);
  print("a flag, one way, processes (mean of 1000)", flags_between_processes(), 2);
  for (const bool is_process : {false, true}) {
    const std::string where = is_process ? ", another process" : ", a thread";
    print(("empty task, one way (half a round trip), spinning" + where).c_str(),
          measure_tasks(is_process, 0), 2);
    print(("empty task, round trip, the worker slept" + where).c_str(),
          measure_sleeping(is_process));
  }
  print("a byte, one way, pipe", measure_bytes(false, 1, 1, 5000), 2);
  print("a byte, one way, UNIX socket", measure_bytes(true, 1, 1, 5000), 2);
  for (const int tokens : {1, 16, 64, 256}) {
    const std::string what = "[" + std::to_string(tokens) + ", 4096] there, 3 of them back, ";
    const auto bytes = static_cast<std::size_t>(2 * tokens) * kHidden;
    print((what + "a thread").c_str(), measure_tasks(false, tokens));
    print((what + "another process").c_str(), measure_tasks(true, tokens));
    print((what + "pipe").c_str(), measure_bytes(false, bytes, 3 * bytes, 300));
    print((what + "UNIX socket").c_str(), measure_bytes(true, bytes, 3 * bytes, 300));
  }

  std::printf("\nq, k, v of 4096 in bf16; a task, two under way\n%10s %6s %8s %9s %9s %8s\n",
              "tokens", "rank", "threads", "median us", "best", "GFLOP/s");
  // As the workers do, the engine's thread runs anywhere now.
  cpu_set_t all;
  std::memset(&all, 0xFF, sizeof all);
  sched_setaffinity(0, sizeof all, &all);
  for (const int tokens : {16, 64, 256}) {
    for (const int rank : {16, 64}) {
      for (std::size_t threads = 1; threads <= cores.size(); ++threads) {
        // The engine's core last: it is the one that waits.
        std::vector<int> used(cores.rbegin(),
                              cores.rbegin() + static_cast<std::ptrdiff_t>(threads));
        const Times us = measure_compute(used, tokens, rank);
        const double flops = 12.0 * tokens * kHidden * rank;
        std::printf("%10d %6d %8zu %9.0f %9.0f %8.0f\n", tokens, rank, threads, us.median, us.best,
                    flops / us.best / 1e3);
        std::fflush(stdout);
      }
    }
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "assist_handoff: %s\n", error.what());
  return 1;
}
