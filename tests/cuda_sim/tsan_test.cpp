// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "planted_cases.h"

// Under ThreadSanitizer: every fiber is a thread to it, and only barriers and atomics order them.
namespace {

int reports = 0;

}  // namespace

extern "C" {
[[gnu::visibility("default")]] const char* __tsan_default_options() {
  return "exitcode=0 history_size=4 suppress_equal_addresses=0";
}
[[gnu::visibility("default")]] void __tsan_on_report(void*) { ++reports; }
}

namespace toppings::sim {
namespace {

template <class Run>
int reports_of(Run run) {
  const int before = reports;
  for (Options options : all_schedules(1)) {
    options.find_races = false;
    run(options);
  }
  return reports - before;
}

TEST(Tsan, CorrectKernelsHaveNoRaces) {
  EXPECT_EQ(reports_of([](const Options& o) { run_pipeline<Bug::none>(o); }), 0);
  EXPECT_EQ(reports_of([](const Options& o) { run_warp_transpose<Bug::none>(o); }), 0);
  EXPECT_EQ(reports_of([](const Options& o) { run_pass_left<Bug::none>(o); }), 0);
  EXPECT_EQ(reports_of([](const Options& o) { run_last_block<Bug::none>(o); }), 0);
  EXPECT_EQ(reports_of([](const Options& o) { run_chain<Bug::none>(o, 3); }), 0);
}

TEST(Tsan, RacesInSharedMemory) {
  EXPECT_GT(reports_of([](const Options& o) { run_pipeline<Bug::missing_barrier>(o); }), 0);
  EXPECT_GT(reports_of([](const Options& o) { run_pipeline<Bug::early_read>(o); }), 0);
  EXPECT_GT(reports_of([](const Options& o) { run_pipeline<Bug::overwritten_stage>(o); }), 0);
  EXPECT_GT(reports_of([](const Options& o) { run_warp_transpose<Bug::missing_warp_barrier>(o); }),
            0);
  EXPECT_GT(
      reports_of([](const Options& o) { run_warp_transpose<Bug::missing_warp_barrier_back>(o); }),
      0);
  EXPECT_GT(reports_of([](const Options& o) { run_pass_left<Bug::vote_as_barrier>(o); }), 0);
}

TEST(Tsan, RacesBetweenBlocks) {
  EXPECT_GT(reports_of([](const Options& o) { run_last_block<Bug::no_release>(o); }), 0);
}

}  // namespace
}  // namespace toppings::sim
