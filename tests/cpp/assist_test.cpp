// SPDX-License-Identifier: Apache-2.0
#include <toppings/device.h>

#include <atomic>
#include <memory>

#include "assist_testing.h"

namespace toppings::assist {
namespace {

TEST(Assist, DeltasAreTheOperators) {
  constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};
  for (const int cores : {1, 2, 3, 4}) {
    for (const int tokens_per_core : {1, 4, 1000}) {
      Channel channel(kGeometry);
      const Workers workers(channel, kHere,
                            {.cores = std::vector<int>(static_cast<std::size_t>(cores), -1),
                             .tokens_per_core = tokens_per_core});
      for (const int tokens : {0, 1, 2, 7, 33}) {
        for (const DType dtype : kDTypes) {
          for (const DType weight_dtype : kDTypes) {
            const Problem problem(tokens, dtype, weight_dtype);
            const Submission submission = submit(channel, problem.task, problem.x.data());
            ASSERT_EQ(channel.await(submission, kLong), Outcome::done);
            EXPECT_TRUE(has_deltas(channel, submission, problem.want))
                << cores << " cores, " << tokens_per_core << " tokens a core, " << tokens
                << " tokens, " << name_of(dtype) << ", " << name_of(weight_dtype);
            channel.release(submission);
          }
        }
      }
    }
  }
}

TEST(Assist, RowsOfXMayBeStrided) {
  Channel channel(kGeometry);
  const Workers workers(channel, kHere, {.cores = {-1}});
  const Problem problem(5);
  const std::size_t row = problem.x.size() / 5, stride = row + 64;
  std::vector<std::byte> x(5 * stride, std::byte{0x7F});
  for (std::size_t t = 0; t < 5; ++t) {
    std::memcpy(x.data() + t * stride, problem.x.data() + t * row, row);
  }
  const auto submission =
      channel.submit(problem.task, x.data(), static_cast<std::int64_t>(stride / 2));
  ASSERT_TRUE(submission);
  ASSERT_EQ(channel.await(*submission, kLong), Outcome::done);
  EXPECT_TRUE(has_deltas(channel, *submission, problem.want));
}

TEST(Assist, TasksOfAnImage) {
  HostStore store(host_device(), 1 << 20);
  const auto shape = testing::small_shape();
  const auto image =
      testing::add_image(store, AdapterLayout(shape, DType::bf16, {{4, 0}, {}, {2}}), "digest");
  const Region region{store.region().data(), std::ssize(store.region())};
  Channel channel(kGeometry);
  const Workers workers(channel, {region}, {.cores = {-1, -1}, .tokens_per_core = 2});
  std::mt19937_64 random(3);
  const auto run = [&](int layer, int count) {
    const Task task = make_task(*image, layer, 0, count, 6, DType::f32, region, 0);
    const auto x = testing::random_floats(static_cast<std::size_t>(6 * task.in), random);
    const Submission submission = submit(channel, task, x.data(), image);
    ASSERT_EQ(channel.await(submission, kLong), Outcome::done);
    EXPECT_TRUE(has_deltas(channel, submission, operators_deltas(task, x.data(), region)));
    channel.release(submission);
  };
  run(0, 2);
  run(2, 1);
  const auto make = [&](int layer, int first, int count, const Region& where) {
    return make_task(*image, layer, first, count, 6, DType::f32, where, 0);
  };
  TOPPINGS_EXPECT_ERROR(make(0, 0, 3, region), invalid_argument);
  TOPPINGS_EXPECT_ERROR(make(0, 2, 1, region), invalid_argument);
  TOPPINGS_EXPECT_ERROR(make(1, 0, 1, region), invalid_argument);
  TOPPINGS_EXPECT_ERROR(make(0, 0, 1, (Region{region.base, 64})), invalid_argument);
}

TEST(Assist, TasksAreChecked) {
  Channel channel(kGeometry);
  const Workers workers(channel, kHere, {.cores = {-1}});
  const Problem problem(3);
  const auto refused = [&](auto change) {
    Task task = problem.task;
    change(task);
    TOPPINGS_EXPECT_ERROR(channel.reserve(task), invalid_argument);
  };
  refused([](Task& task) { task.tokens = -1; });
  refused([](Task& task) { task.tokens = 1 << 15; });  // x and deltas too large for the slot
  refused([](Task& task) { task.tokens = INT32_MAX; });
  refused([](Task& task) { task.in = 0; });
  refused([](Task& task) { task.num_projections = 0; });
  refused([](Task& task) { task.num_projections = kMaxProjections + 1; });
  refused([](Task& task) { task.dtype = static_cast<DType>(3); });
  refused([](Task& task) { task.weight_dtype = static_cast<DType>(255); });
  refused([](Task& task) { task.projections[1].out = 0; });
  refused([](Task& task) { task.projections[0].out = INT32_MAX; });
  refused([](Task& task) { task.projections[2].rank = -1; });
  EXPECT_EQ(channel.stats().free, 4);
}

// Only the worker knows its regions: it refuses, the engine hears that nobody will do it.
TEST(Assist, WeightsOutsideOfTheRegionAreNeverRead) {
  Problem problem(3);
  const Region region = problem.region();
  const auto far = [&](auto change) {
    Problem wrong(3);
    for (TaskProjection& p : wrong.task.projections) {
      p.a_offset -= reinterpret_cast<std::intptr_t>(wrong.weights.data());
      p.b_offset -= reinterpret_cast<std::intptr_t>(wrong.weights.data());
    }
    change(wrong.task);
    Channel channel(kGeometry);
    const Workers workers(channel, {region}, {.cores = {-1}});
    const Submission submission = submit(channel, wrong.task, wrong.x.data());
    EXPECT_EQ(channel.await(submission, kLong), Outcome::gone);
    TOPPINGS_EXPECT_ERROR(channel.redo(submission, std::vector<Region>{region}), invalid_argument);
    channel.release(submission);
    EXPECT_EQ(channel.stats().free, 4);
    EXPECT_EQ(workers.stats().refused, 1);
  };
  far([](Task& task) { task.region = 1; });
  far([](Task& task) { task.region = -1; });
  far([](Task& task) { task.projections[0].a_offset = -2; });
  far([](Task& task) { task.projections[0].a_offset += 1; });
  far([](Task& task) { task.projections[2].b_offset += 2; });
  far([](Task& task) { task.projections[0].rank = INT32_MAX - 1; });
  far([](Task& task) { task.projections[2].a_offset = INT64_MAX - 1; });
}

// A rank that asks for hundreds of gigabytes.
TEST(Assist, AWorkerWithoutMemoryRefuses) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer's allocator ends the process";
#endif
  Channel channel(kGeometry);
  const Workers workers(channel, kHere, {.cores = {-1, -1}, .tokens_per_core = 100});
  Problem problem(200);
  problem.task.in = 1;
  for (TaskProjection& p : problem.task.projections) {
    p.out = 1;
    p.rank = 1 << 30;
  }
  const Submission submission = submit(channel, problem.task, problem.x.data());
  EXPECT_EQ(channel.await(submission, kLong), Outcome::gone);
  EXPECT_EQ(workers.stats().refused, 1);
  channel.release(submission);
  const Problem possible(3);
  const Submission next = submit(channel, possible.task, possible.x.data());
  EXPECT_EQ(channel.await(next, kLong), Outcome::done);
}

TEST(Assist, SeveralTasksAreUnderWay) {
  Channel channel(kGeometry);
  const Workers workers(channel, kHere, {.cores = {-1, -1}, .tokens_per_core = 4});
  std::vector<Problem> problems;
  for (std::uint64_t i = 0; i < 4; ++i) problems.emplace_back(9, DType::f32, DType::bf16, i);
  for (int round = 0; round < 20; ++round) {
    std::vector<Submission> submissions;
    for (const Problem& p : problems) submissions.push_back(submit(channel, p.task, p.x.data()));
    EXPECT_FALSE(channel.submit(problems[0].task, problems[0].x.data(), 96));  // full
    for (std::size_t i = 4; i-- > 0;) {
      ASSERT_EQ(channel.await(submissions[i], kLong), Outcome::done);
      EXPECT_TRUE(has_deltas(channel, submissions[i], problems[i].want));
      channel.release(submissions[i]);
    }
  }
  EXPECT_EQ(workers.stats().tasks, 80);
  EXPECT_EQ(workers.stats().late, 0);
}

TEST(Assist, ManyEngineThreads) {
  Channel channel(kGeometry);
  const Workers workers(channel, kHere, {.cores = {-1, -1}, .tokens_per_core = 3});
  std::atomic<int> right = 0;
  std::vector<std::thread> engines;
  for (std::uint64_t e = 0; e < 6; ++e) {
    engines.emplace_back([&, e] {
      const Problem problem(static_cast<int>(1 + e * 3), DType::bf16, DType::bf16, e);
      for (int i = 0; i < 50; ++i) {
        const Submission submission = submit(channel, problem.task, problem.x.data());
        if (channel.await(submission, kLong) == Outcome::done &&
            has_deltas(channel, submission, problem.want)) {
          ++right;
        }
        channel.release(submission);
      }
    });
  }
  for (std::thread& engine : engines) engine.join();
  EXPECT_EQ(right, 300);
}

TEST(Assist, EpochsWrap) {
  for (const std::uint32_t first : {0x7FFFFFF8U, 0xFFFFFFF8U}) {
    Channel channel({.num_slots = 1, .x_bytes = 1 << 16, .deltas_bytes = 1 << 17}, {}, first);
    const Problem problem(2);
    std::uint32_t epoch = first;
    for (int group = 0; group < 3; ++group) {
      const Workers workers(channel, kHere, {.cores = {-1, -1}, .tokens_per_core = 1});
      for (int i = 0; i < 4; ++i) {
        const Submission submission = submit(channel, problem.task, problem.x.data());
        EXPECT_EQ(submission.epoch, epoch += 2);
        if (i % 2 == 0) channel.redo(submission, kHere);
        ASSERT_EQ(channel.await(submission, kLong), Outcome::done);
        EXPECT_TRUE(has_deltas(channel, submission, problem.want));
        channel.release(submission);
      }
    }
  }
  TOPPINGS_EXPECT_ERROR(Channel(kGeometry, {}, 1), invalid_argument);
}

TEST(Assist, NobodyServes) {
  Channel channel(kGeometry);
  const Problem problem(3);
  EXPECT_FALSE(channel.has_workers());
  EXPECT_FALSE(channel.submit(problem.task, problem.x.data(), 96));
  std::optional<Submission> submission;
  {
    const Workers workers(channel, kHere, {.cores = {-1}});
    EXPECT_TRUE(channel.has_workers(kLong));
    submission = channel.reserve(problem.task);  // and x comes too late
    TOPPINGS_EXPECT_ERROR(channel.redo(*submission, kHere), invalid_argument);
    TOPPINGS_EXPECT_ERROR(channel.deltas(*submission), invalid_argument);
    EXPECT_EQ(channel.await(*submission, milliseconds(2)), Outcome::timed_out);
  }
  EXPECT_FALSE(channel.has_workers());
  EXPECT_EQ(channel.await(*submission, kLong), Outcome::gone);
  std::memcpy(channel.x(*submission), problem.x.data(), problem.x.size());
  const Flag request = channel.request(*submission);
  host_device()->wrap_stream(nullptr)->write_value(request.address, request.value);
  channel.redo(*submission, kHere);
  EXPECT_EQ(channel.await(*submission, kLong), Outcome::done);
  EXPECT_TRUE(has_deltas(channel, *submission, problem.want));
  channel.release(*submission);
  EXPECT_EQ(channel.stats().free, 4);
  TOPPINGS_EXPECT_ERROR(channel.release(*submission), invalid_argument);
}

TEST(Assist, AnImageIsHeldUntilNoWorkerCanReadIt) {
  Channel channel(kGeometry);
  const Problem problem(3);
  auto image = std::make_shared<int>(1);
  const std::weak_ptr<int> watch = image;
  auto workers = std::make_unique<Workers>(channel, kHere, WorkersOptions{.cores = {-1}});
  const auto submission = channel.reserve(problem.task, std::move(image));
  ASSERT_TRUE(submission);
  channel.release(*submission);  // given up, but not acknowledged
  EXPECT_EQ(channel.stats().quarantined, 1);
  EXPECT_FALSE(watch.expired());
  workers.reset();
  EXPECT_EQ(channel.stats().free, 4);
  EXPECT_TRUE(watch.expired());
}

TEST(Assist, OneGroupOfWorkers) {
  Channel channel(kGeometry);
  const WorkersOptions options{.cores = {-1}};
  {
    const Workers workers(channel, kHere, options);
    TOPPINGS_EXPECT_ERROR(Workers(channel, kHere, options), invalid_argument);
  }
  TOPPINGS_EXPECT_ERROR(Workers(channel, kHere, {}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(Workers(channel, kHere, {.cores = {1 << 20}}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(Workers(channel, kHere, {.cores = {-1}, .tokens_per_core = 0}),
                        invalid_argument);
  const Workers again(channel, kHere, options);
}

TEST(Assist, SleepingWorkersAreWoken) {
  Channel channel(kGeometry);
  const Workers workers(channel, kHere, {.cores = {-1, -1}, .spin = std::chrono::microseconds(0)});
  const Problem problem(3);
  for (int i = 0; i < 5; ++i) {
    const std::int64_t sleeps = workers.stats().sleeps;
    ASSERT_TRUE(eventually([&] { return workers.stats().sleeps >= sleeps + 2; }));
    EXPECT_TRUE(channel.has_workers(seconds(10)));
    const Submission submission = submit(channel, problem.task, problem.x.data());
    ASSERT_EQ(channel.await(submission, kLong), Outcome::done);
    channel.release(submission);
  }
}

// The host only enqueues: a stream copies x, asks, and waits for the reply.
TEST(Assist, InStreamOrder) {
  const std::shared_ptr<Device> device = host_device();
  const auto stream = device->make_stream();
  const auto event = device->make_event();
  Channel channel(kGeometry);
  auto workers = std::make_unique<Workers>(channel, kHere, WorkersOptions{.cores = {-1}});
  const Problem problem(8);
  const auto enqueue = [&] {
    const auto submission = channel.reserve(problem.task);
    const Flag request = channel.request(*submission), reply = channel.reply(*submission);
    stream->copy(channel.x(*submission), problem.x.data(), problem.x.size());
    stream->write_value(request.address, request.value);
    stream->wait_value(reply.address, reply.value);
    return *submission;
  };
  std::vector<Submission> submissions;
  for (int i = 0; i < 4; ++i) submissions.push_back(enqueue());
  stream->record(*event);
  ASSERT_TRUE(event->wait_for(kLong));
  for (const Submission& submission : submissions) {
    EXPECT_TRUE(has_deltas(channel, submission, problem.want));
    channel.release(submission);
  }

  // Without workers the stream would wait for ever; redo lets it go on.
  std::uint32_t gate = 0;
  stream->wait_value(&gate, 1);
  const Submission orphan = enqueue();
  stream->record(*event);
  workers.reset();
  host_device()->wrap_stream(nullptr)->write_value(&gate, 1);
  ASSERT_TRUE(eventually([&] {
    const Flag request = channel.request(orphan);
    return std::atomic_ref(*request.address).load() == request.value;
  }));
  EXPECT_EQ(channel.await(orphan, kLong), Outcome::gone);
  EXPECT_FALSE(event->is_done());
  channel.redo(orphan, kHere);
  ASSERT_TRUE(event->wait_for(kLong));
  EXPECT_TRUE(has_deltas(channel, orphan, problem.want));
}

TEST(Assist, ImpossibleGeometries) {
  TOPPINGS_EXPECT_ERROR(Channel({.num_slots = 0, .x_bytes = 1, .deltas_bytes = 1}),
                        invalid_argument);
  TOPPINGS_EXPECT_ERROR(Channel({.num_slots = 1, .x_bytes = 0, .deltas_bytes = 1}),
                        invalid_argument);
  TOPPINGS_EXPECT_ERROR(Channel({.num_slots = 1, .x_bytes = 1, .deltas_bytes = INT64_MAX}),
                        invalid_argument);
  TOPPINGS_EXPECT_ERROR(
      Channel({.num_slots = 4096, .x_bytes = 1, .deltas_bytes = std::int64_t{1} << 40}),
      out_of_memory);
}

}  // namespace
}  // namespace toppings::assist
