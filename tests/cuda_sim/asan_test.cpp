// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "planted_cases.h"

// Under AddressSanitizer: no list of the memory is needed, and plain accesses are seen as well.
namespace toppings::sim {
namespace {

using namespace cuda;

TEST(Asan, CorrectKernelsPass) {
  for (const Options& options : all_schedules()) {
    EXPECT_TRUE(run_pipeline<Bug::none>(options).correct);
    EXPECT_TRUE(run_warp_transpose<Bug::none>(options).correct);
    EXPECT_TRUE(run_pass_left<Bug::none>(options).correct);
    EXPECT_TRUE(run_last_block<Bug::none>(options).correct);
    EXPECT_TRUE(run_chain<Bug::none>(options, 3).correct);
  }
}

TOPPINGS_KERNEL plain_accesses(const float* x, float* y, unsigned read, unsigned written) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const unsigned i = thread_index().x;
  shared[i + written] = x[i + read];
  sync_block();
  y[i] = shared[31 - i + written];
}

void run_plain(unsigned read, unsigned written) {
  const std::vector<float> x(32);
  std::vector<float> y(32);
  launch(plain_accesses, {.block = {32}, .shared_bytes = 128}, {}, x.data(), y.data(), read,
         written);
}

TEST(Asan, PlainAccessesBeyondTheEnd) {
  run_plain(0, 0);
  EXPECT_DEATH(run_plain(1, 0), "heap-buffer-overflow.*asan_test.cpp:");
  EXPECT_DEATH(run_plain(0, 1), "heap-buffer-overflow.*asan_test.cpp:");
}

void read_beyond(const Options& options) {
  const auto x = std::make_unique<std::byte[]>(16 * 31);
  std::vector<std::uint32_t> sums(cuda::planted::kThreads);
  const cuda::planted::Pipeline arguments{x.get(), 1, 1, sums.data()};
  launch(cuda::planted::pipeline<Bug::none>,
         {.block = {cuda::planted::kThreads}, .shared_bytes = cuda::planted::kPipelineShared},
         options, arguments);
}

TEST(Asan, CopyBeyondTheEnd) {
  for (const Options& options : all_schedules(1)) {
    EXPECT_DEATH(read_beyond(options), "heap-buffer-overflow");
  }
}

// A launch that is given up leaves frames behind on stacks that are used again.
TEST(Asan, LaunchesAfterAnAbandonedOne) {
  for (int time = 0; time < 3; ++time) {
    EXPECT_FALSE(run_pipeline<Bug::skipped_barrier>({}).report.ok());
    EXPECT_TRUE(run_pipeline<Bug::none>({}).correct);
  }
}

}  // namespace
}  // namespace toppings::sim
