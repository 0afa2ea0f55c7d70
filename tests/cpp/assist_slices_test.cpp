// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "assist/slices.h"

namespace toppings::assist {
namespace {

TEST(Slices, AreTakenOnceAndFinishedOnce) {
  Slices slices;
  slices.reset(10);
  EXPECT_FALSE(slices.take());
  ASSERT_TRUE(slices.try_open(12));
  EXPECT_FALSE(slices.try_open(12));
  EXPECT_FALSE(slices.take());  // not before it is open
  Task task{};
  task.tokens = 7;
  slices.open(12, task, 2);
  EXPECT_EQ(slices.task().tokens, 7);
  EXPECT_EQ(slices.take(), 1U);
  EXPECT_EQ(slices.take(), 0U);
  EXPECT_FALSE(slices.take());
  EXPECT_EQ(slices.epoch(), 12U);
  EXPECT_FALSE(slices.finish());
  EXPECT_TRUE(slices.finish());
}

TEST(Slices, AThreadThatWasHeldUpReopensNothing) {
  Slices slices;
  slices.reset(10);
  ASSERT_TRUE(slices.try_open(14));
  slices.open(14, Task{}, 0);
  EXPECT_FALSE(slices.try_open(12));
  EXPECT_FALSE(slices.try_open(14));
  EXPECT_TRUE(slices.try_open(16));
}

TEST(Slices, AreNotReopenedUnderAThread) {
  Slices slices;
  slices.reset(10);
  ASSERT_TRUE(slices.try_open(12));
  slices.open(12, Task{}, 1);
  ASSERT_TRUE(slices.take());
  EXPECT_FALSE(slices.try_open(14));
  EXPECT_TRUE(slices.finish());
  EXPECT_TRUE(slices.try_open(14));
}

TEST(Slices, EpochsWrap) {
  Slices slices;
  slices.reset(0xFFFFFFFE);
  EXPECT_FALSE(slices.try_open(0xFFFFFFFC));
  ASSERT_TRUE(slices.try_open(0));
  slices.open(0, Task{}, 1);
  EXPECT_EQ(slices.take(), 0U);
  EXPECT_EQ(slices.epoch(), 0U);
}

}  // namespace
}  // namespace toppings::assist
