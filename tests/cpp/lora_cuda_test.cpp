// SPDX-License-Identifier: Apache-2.0
#include <toppings/lora_cuda.h>

#include <cstdint>
#include <vector>

#include "testing.h"

// What lora_cuda.h does without touching a GPU: its checks and sizes.
namespace toppings::cuda {
namespace {

class LoraCuda : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!is_built()) GTEST_SKIP() << "built without nvcc";
  }

  LoraForward args() const {
    return {.batch = {.tokens = 3,
                      .num_slots = 2,
                      .num_projections = 1,
                      .slots = nullptr,
                      .scales = nullptr,
                      .token_slots = nullptr,
                      .max_rank = 64},
            .dtype = DType::bf16,
            .a_dtype = DType::bf16,
            .b_dtype = DType::bf16,
            .in = 4096,
            .widths = widths_,
            .x = reinterpret_cast<const void*>(4096),
            .x_stride = 4096,
            .y = reinterpret_cast<void*>(std::uintptr_t{1} << 44),
            .y_stride = 1024,
            .a = nullptr,
            .a_size = 0,
            .b = nullptr,
            .b_size = 0};
  }

 private:
  std::vector<std::int64_t> widths_ = {1024};
};

TEST_F(LoraCuda, TheWorkspaceGrowsWithTokensAndRank) {
  LoraForward forward = args();
  const std::size_t few = lora_workspace_bytes(forward);
  EXPECT_GT(few, 0U);
  forward.batch.max_rank = 512;
  EXPECT_GT(lora_workspace_bytes(forward), few);
  forward.batch.tokens = 100;
  EXPECT_GT(lora_workspace_bytes(forward), few * 5);
  forward.batch.tokens = 1'000'000;
  EXPECT_LT(lora_workspace_bytes(forward), std::size_t{80} << 20);
  EXPECT_LT(lora_workspace_counters_bytes(), few);
  EXPECT_GE(lora_workspace_counters_bytes(), std::size_t{4} * (2 + 32 * 1024));
}

TEST_F(LoraCuda, NothingToDoNeedsNothing) {
  for (std::int64_t LoraBatch::* field :
       {&LoraBatch::tokens, &LoraBatch::num_slots, &LoraBatch::max_rank}) {
    LoraForward forward = args();
    forward.batch.*field = 0;
    EXPECT_EQ(lora_workspace_bytes(forward), 0U);
    lora_forward(forward, {});
  }
}

TEST_F(LoraCuda, WrongArgumentsAreRefused) {
  const auto refused = [&](auto change) {
    LoraForward forward = args();
    change(forward);
    TOPPINGS_EXPECT_ERROR(lora_workspace_bytes(forward), invalid_argument);
    TOPPINGS_EXPECT_ERROR(lora_forward(forward, {}), invalid_argument);
  };
  refused([](LoraForward& forward) { forward.batch.tokens = -1; });
  refused([](LoraForward& forward) { forward.batch.max_rank = 1 << 21; });
  refused([](LoraForward& forward) { forward.in = 0; });
  refused([](LoraForward& forward) { forward.in = std::int64_t{1} << 31; });
  refused([](LoraForward& forward) { forward.widths = {}; });
  refused([](LoraForward& forward) { forward.y_stride = 1023; });
  refused([](LoraForward& forward) { forward.y = const_cast<void*>(forward.x); });
}

TEST_F(LoraCuda, ASmallOrCrookedWorkspaceIsRefused) {
  const LoraForward forward = args();
  const std::size_t bytes = lora_workspace_bytes(forward);
  TOPPINGS_EXPECT_ERROR(lora_forward(forward, {}), invalid_argument);
  TOPPINGS_EXPECT_ERROR(lora_forward(forward, {.workspace = reinterpret_cast<void*>(4096),
                                               .workspace_bytes = bytes - 1}),
                        invalid_argument);
  TOPPINGS_EXPECT_ERROR(lora_forward(forward, {.workspace = reinterpret_cast<void*>(4096 + 64),
                                               .workspace_bytes = bytes}),
                        invalid_argument);
}

TEST(LoraCudaAbsent, IsRefusedByName) {
  if (is_built()) GTEST_SKIP() << "built with nvcc";
  TOPPINGS_EXPECT_ERROR(lora_plan(nullptr, 0, 0, nullptr, nullptr), unsupported);
}

}  // namespace
}  // namespace toppings::cuda
