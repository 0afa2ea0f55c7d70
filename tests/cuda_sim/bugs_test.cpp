// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "planted_cases.h"

// Plants bugs, and requires each to be caught and the correct kernel to pass, in every schedule.
namespace toppings::sim {
namespace {

using namespace cuda;

#define EXPECT_TEXT(report, part) \
  EXPECT_NE((report).text().find(part), std::string::npos) << (report).text()

std::vector<Options> without_races(std::vector<Options> all) {
  for (Options& options : all) options.find_races = false;
  return all;
}

TEST(Bugs, CorrectKernelsPass) {
  for (const bool find_races : {true, false}) {
    for (Options options : all_schedules(4)) {
      SCOPED_TRACE(name_of(options));
      options.find_races = find_races;
      for (const Outcome& outcome :
           {run_pipeline<Bug::none>(options), run_warp_transpose<Bug::none>(options),
            run_pass_left<Bug::none>(options), run_last_block<Bug::none>(options),
            run_chain<Bug::none>(options, 3)}) {
        EXPECT_TRUE(outcome.correct);
        EXPECT_EQ(outcome.report.text(), "");
      }
    }
  }
}

TEST(Bugs, TheSameOptionsGiveTheSameRun) {
  for (const Options& options : all_schedules()) {
    const Outcome first = run_pipeline<Bug::missing_barrier>(options);
    const Outcome second = run_pipeline<Bug::missing_barrier>(options);
    EXPECT_EQ(first.report.text(), second.report.text());
  }
}

// The order of accesses gives these away in every schedule, whatever the numbers come to.
TEST(Bugs, RacesAreSeenInEverySchedule) {
  for (const Options& options : all_schedules()) {
    SCOPED_TRACE(name_of(options));
    for (const Outcome& outcome :
         {run_pipeline<Bug::missing_barrier>(options), run_pipeline<Bug::early_read>(options),
          run_pipeline<Bug::overwritten_stage>(options),
          run_warp_transpose<Bug::missing_warp_barrier>(options),
          run_warp_transpose<Bug::missing_warp_barrier_back>(options)}) {
      EXPECT_TEXT(outcome.report, "race: thread ");
    }
  }
}

TEST(Bugs, EarlyReadsAreNamed) {
  EXPECT_TEXT(run_pipeline<Bug::early_read>({.copies = Copies::early}).report,
              "is on its way: expected wait_copies first, got none");
}

// Poison, late copies and extreme orders alone: for what doesn't go through load_shared. Each bug
// must give wrong numbers in the schedules named.
TEST(Bugs, SchedulesMakeWrongResults) {
  for (const Options& options : without_races(all_schedules(4))) {
    SCOPED_TRACE(name_of(options));
    const bool late = options.copies == Copies::late;
    EXPECT_FALSE(run_pipeline<Bug::missing_barrier>(options).correct);
    EXPECT_FALSE(run_warp_transpose<Bug::missing_warp_barrier>(options).correct);
    EXPECT_FALSE(run_warp_transpose<Bug::missing_warp_barrier_back>(options).correct);
    if (late) {
      EXPECT_FALSE(run_pipeline<Bug::early_read>(options).correct);
    }
    if (late) {
      EXPECT_FALSE(run_pipeline<Bug::overwritten_stage>(options).correct);
    }
  }
}

// No schedule can show it: lanes do wait for each other in a vote.
TEST(Bugs, VoteAsBarrierNeedsTheCheckOfRaces) {
  for (const Options& options : without_races(all_schedules())) {
    const Outcome outcome = run_pass_left<Bug::vote_as_barrier>(options);
    EXPECT_TRUE(outcome.correct);
    EXPECT_EQ(outcome.report.text(), "");
  }
}

TEST(Bugs, UnfinishedCopies) {
  for (const Options& options : without_races(all_schedules())) {
    SCOPED_TRACE(name_of(options));
    EXPECT_TEXT(run_pipeline<Bug::unfinished_copies>(options).report,
                "expected wait_copies for every copy before it exits, got none for that of "
                "planted.cuh:");
  }
}

TEST(Bugs, RowBeyondTheLast) {
  for (const Options& options : all_schedules()) {
    SCOPED_TRACE(name_of(options));
    const Report report = run_pipeline<Bug::out_of_bounds_row>(options).report;
    EXPECT_TEXT(report, "global copy of 16 bytes, block (");
    EXPECT_TEXT(report, "expected an address within the kernel's memory, got offset ");
  }
}

TEST(Bugs, SkippedBarrier) {
  for (const Options& options : without_races(all_schedules())) {
    SCOPED_TRACE(name_of(options));
    const Report report = run_pipeline<Bug::skipped_barrier>(options).report;
    EXPECT_TEXT(report, "deadlock: block (");
    EXPECT_TEXT(report, "threads 32-63 have exited");
    EXPECT_TEXT(report, "threads 64-127 wait in sync_block (planted.cuh:");
  }
}

TEST(Bugs, RelaxedCounterIsForThreadSanitizer) {
  // Memory is sequentially consistent here: see tsan_test.cpp.
  EXPECT_TRUE(run_last_block<Bug::no_release>({}).correct);
}

TEST(Bugs, ConstantLoadOfWhatTheKernelWrites) {
  for (const Options& options : all_schedules()) {
    SCOPED_TRACE(name_of(options));
    const Report report = run_last_block<Bug::constant_load>(options).report;
    EXPECT_TEXT(report, "expected load_global_coherent for what the kernel itself writes");
  }
}

TEST(Bugs, FlagThatNobodySets) {
  for (const Options& options : all_schedules()) {
    SCOPED_TRACE(name_of(options));
    const Report report = run_chain<Bug::lost_flag>(options, 3).report;
    EXPECT_TEXT(report, "no progress: block (0, 0, 0): threads 0-");
    EXPECT_TEXT(report, " wait for others (planted.cuh:");
  }
}

TEST(Bugs, MoreBlocksThanResident) {
  EXPECT_TRUE(run_chain<Bug::none>({.order = Order::reversed, .blocks_in_flight = 2}, 9).correct);
  const Report report =
      run_chain<Bug::none>({.order = Order::forward, .blocks_in_flight = 4}, 9).report;
  EXPECT_TEXT(report, "5 blocks have not started: expected at most 4 blocks that wait");
}

TEST(Bugs, NakedSpinning) {
  const Report report = run_chain<Bug::naked_spinning>({}).report;
  EXPECT_TEXT(report, "endless loop: block (0, 0, 0) thread 0 passed planted.cuh:");
  EXPECT_TEXT(report, "expected yield_while_waiting() in a loop that waits, got none");
}

// ---- collectives that don't meet

TOPPINGS_KERNEL meet_badly(int how, float* y) {
  const unsigned thread = thread_index().x;
  float value = 1;
  if (how == 0 && thread == 5) return;
  if (how == 1 && thread >= 16) value = shuffle_xor(value, 1);
  if (how == 2 && thread == 40) sync_warp();
  if (how == 3) {
    if (warp() == 0) {
      sync_block();
    } else {
      sync_block();
    }
  }
  if (ballot(value > 0) != 0) value = 2;
  if (how == 4 && thread == 33) return;
  sync_block();
  store_global(y + thread, value);
}

TEST(Bugs, CollectivesThatDontMeet) {
  const auto expect = [](int how, std::string_view part, Order order = Order::forward) {
    std::vector<float> y(64);
    const Report report = launch(meet_badly, {.block = {64}}, {.order = order}, how, y.data());
    EXPECT_TEXT(report, part);
  };
  expect(0, "deadlock: block (0, 0, 0): threads 0-4 wait in ballot (bugs_test.cpp:");
  expect(0, "thread 5 have exited");
  expect(1, "divergence: block (0, 0, 0): expected thread 16 in ballot (bugs_test.cpp:");
  expect(1, ") with thread 0, got shuffle (bugs_test.cpp:");
  expect(2, "expected thread 40 in ballot");
  expect(2, "with thread 63, got sync_warp", Order::reversed);
  expect(3, "expected thread 32 in sync_block (bugs_test.cpp:");
  expect(4, "thread 33 have exited");
}

// ---- accesses

TOPPINGS_KERNEL access_badly(int how, std::byte* global) {
  std::byte* shared = dynamic_shared();
  if (thread_index().x != 7) return;
  if (how == 0) store_shared<float>(shared + 256, 1);
  if (how == 1) store_shared<float>(shared - 4, 1);
  if (how == 2) store_shared<Vec16>(shared + 8, {});
  if (how == 3) store_global<Vec8>(global + 4, {});
  if (how == 4) store_global<float>(global + 64, 1);
  if (how == 5) copy_async<8>(shared, global, 9);
  if (how == 6) copy_async<16>(shared, global + 8, 16);
  if (how == 7) copy_async<16>(shared, global + 48, 17 - 1);
  if (how == 8) copy_async<16>(shared, global + 56, 0);
  wait_copies<0>();
  if (how == 9) wait_copies<0>();
}

TEST(Bugs, BadAccesses) {
  alignas(16) std::byte global[64] = {};
  const auto text = [&](int how) {
    const Options options{.memory = {{global, sizeof global, "global"}}};
    return launch(access_badly, {.block = {32}, .shared_bytes = 256}, options, how, +global).text();
  };
  EXPECT_NE(text(0).find("shared store of 4 bytes, block (0, 0, 0) thread 7 (bugs_test.cpp:"),
            std::string::npos);
  EXPECT_NE(text(0).find("expected an offset within 256 bytes, got 256"), std::string::npos);
  EXPECT_NE(text(1).find("expected an offset within 256 bytes, got -4"), std::string::npos);
  EXPECT_NE(text(2).find("expected a multiple of its size, got 8 over"), std::string::npos);
  EXPECT_NE(text(3).find("global store of 8 bytes"), std::string::npos);
  EXPECT_NE(text(4).find("got offset 64 of the 64 bytes of global"), std::string::npos);
  EXPECT_NE(text(5).find("expected 0 to 8 valid bytes, got 9"), std::string::npos);
  EXPECT_NE(text(6).find("global copy of 16 bytes"), std::string::npos);
  for (const int fine : {7, 8, 9}) {
    EXPECT_EQ(text(fine).find("global"), std::string::npos) << text(fine);
  }
}

TOPPINGS_KERNEL overlap(int how, const float* weights, float* y) {
  const float weight = load_global<float>(weights + thread_index().x);
  if (how == 0 || (how == 1 && thread_index().x == 40)) wait_for_previous_kernel();
  if (how == 1) sync_block();
  store_global(y + thread_index().x, weight);
}

TEST(Bugs, MemoryOfThePreviousKernel) {
  const std::vector<float> weights(64);
  std::vector<float> y(64);
  const auto text = [&](int how, bool overlaps) {
    const Options options{.memory = {{weights.data(), 256, "weights"}, {y.data(), 256, "y", true}}};
    const LaunchConfig config{.block = {64}, .overlaps_previous = overlaps};
    return launch(overlap, config, options, how, weights.data(), y.data()).text();
  };
  EXPECT_EQ(text(0, true), "");
  EXPECT_EQ(text(1, true), "");
  EXPECT_EQ(text(2, false), "");
  EXPECT_NE(text(2, true).find("expected wait_for_previous_kernel() before any access to y"),
            std::string::npos);
}

TEST(Bugs, BadLaunches) {
  const auto text = [](const LaunchConfig& config) {
    return launch(meet_badly, config, {}, 9, nullptr).text();
  };
  EXPECT_EQ(text({.block = {40, 2, 1}}),
            "block: expected 32 to 1024 threads, a multiple of 32 in x, got (40, 2, 1)\n");
  EXPECT_EQ(text({.grid = {1, 0, 1}, .block = {32}}),
            "grid: expected 1 to 2^31 - 1, 65535 and 65535, got (1, 0, 1)\n");
  EXPECT_EQ(text({.block = {32}, .shared_bytes = 300000}),
            "shared memory: expected at most 232448 bytes, got 300000\n");
}

}  // namespace
}  // namespace toppings::sim
