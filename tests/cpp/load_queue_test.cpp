// SPDX-License-Identifier: Apache-2.0
#include "load/load_queue.h"

#include <gtest/gtest.h>

namespace toppings {
namespace {

using Load = std::shared_ptr<LoadState>;

class LoadQueueTest : public ::testing::Test {
 protected:
  Load add(LoadPriority priority = LoadPriority::normal) {
    auto load = std::make_shared<LoadState>(nullptr, 0, nullptr, std::vector<int>{0, 1, 2, 3});
    load->priority = priority;
    queue_.add(load);
    return load;
  }

  // What the loader does when it enqueues a layer.
  static void copy(const Load& load, int stream, std::int64_t bytes = 1) {
    ++load->next;
    ++load->in_flight;
    load->stream = stream;
    load->served += bytes;
  }

  LoadQueue queue_;
};

TEST_F(LoadQueueTest, IsEmptyAtFirst) {
  EXPECT_EQ(queue_.next(0), nullptr);
  const Load load = add();
  EXPECT_EQ(queue_.next(0), load);
  queue_.remove(*load);
  EXPECT_EQ(queue_.next(0), nullptr);
}

TEST_F(LoadQueueTest, KeepsALoadInOneStream) {
  const Load load = add();
  copy(load, 1);
  EXPECT_EQ(queue_.next(0), nullptr);
  EXPECT_EQ(queue_.next(1), load);
  load->in_flight = 0;
  EXPECT_EQ(queue_.next(0), load);
}

TEST_F(LoadQueueTest, SharesByBytes) {
  const Load first = add();
  copy(first, 0, 10);
  const Load second = add();  // begins level with the others
  EXPECT_EQ(second->served, 10);
  copy(second, 0, 3);
  copy(second, 0, 3);
  copy(first, 0, 10);
  EXPECT_EQ(queue_.next(0), second);
  copy(second, 0, 30);
  EXPECT_EQ(queue_.next(0), first);
}

TEST_F(LoadQueueTest, LowerClassesWait) {
  const Load low = add(LoadPriority::prefetch);
  const Load high = add(LoadPriority::urgent);
  EXPECT_EQ(queue_.next(0), high);
  copy(high, 0);
  EXPECT_EQ(queue_.next(1), nullptr);  // high stays in its stream, and low doesn't slow it down
  EXPECT_EQ(queue_.next(0), high);
  low->demanded = 1;
  EXPECT_EQ(queue_.next(1), low);
  copy(low, 1);  // the layer in demand; the others are a prefetch again
  EXPECT_EQ(queue_.next(1), nullptr);
  while (high->has_waiting()) copy(high, 0);
  EXPECT_EQ(queue_.next(1), nullptr);  // not beside what is in flight
  low->in_flight = 0;
  EXPECT_EQ(queue_.next(1), nullptr);
  EXPECT_EQ(queue_.next(0), low);  // but behind it
  high->in_flight = 0;
  EXPECT_EQ(queue_.next(1), low);
}

TEST_F(LoadQueueTest, AnEarlierLoadOfTheSlotEndsFirst) {
  const Load first = add();
  copy(first, 0);
  first->status = LoadStatus::cancelled;
  const Load second = add();
  second->predecessor = first;
  EXPECT_EQ(queue_.next(0), nullptr);
  first->in_flight = 0;
  EXPECT_EQ(queue_.next(0), second);
}

TEST_F(LoadQueueTest, CountsWhoSharesTheLink) {
  const Load load = add();
  EXPECT_EQ(queue_.sharers(*load), 1);
  add();
  add(LoadPriority::prefetch);
  EXPECT_EQ(queue_.sharers(*load), 2);
  const Load urgent = add(LoadPriority::urgent);
  EXPECT_EQ(queue_.sharers(*load), 3);
  EXPECT_EQ(queue_.sharers(*urgent), 1);
}

}  // namespace
}  // namespace toppings
