// SPDX-License-Identifier: Apache-2.0
#include <toppings/image_reader.h>

#include <atomic>
#include <thread>

#include "image_file_testing.h"

namespace toppings {
namespace {

using namespace std::chrono_literals;
using testing::expect_equal;
using testing::layout_of_bytes;
using testing::TemporaryFolder;

constexpr std::chrono::nanoseconds kEver = std::chrono::nanoseconds::max();

// Files "0", "1", ... of images of 512 bytes with digests of the same names.
class ImageReaderTest : public ::testing::Test {
 protected:
  static constexpr int kFiles = 12;

  ImageReaderTest() {
    for (int i = 0; i < kFiles; ++i) {
      const std::string name = std::to_string(i);
      images_.push_back(
          testing::add_image(source_, layout_of_bytes(512), name, static_cast<std::uint64_t>(i)));
      write_image(*images_.back(), folder_ / name);
    }
  }

  std::string path(int i) const { return folder_ / std::to_string(i); }

  TemporaryFolder folder_;
  HostStore source_{host_device(), kFiles * 512};
  std::vector<std::shared_ptr<const Image>> images_;
};

TEST_F(ImageReaderTest, ReadsInTheBackground) {
  const auto store = std::make_shared<HostStore>(host_device(), kFiles * 512);
  ImageReader reader(store, 2);
  std::vector<std::shared_ptr<ReadTicket>> tickets;
  const auto shape = images_[0]->layout().shape();
  for (int i = 0; i < kFiles; ++i) tickets.push_back(reader.read(path(i), shape));
  for (int i = 0; i < kFiles; ++i) {
    const auto image = tickets[static_cast<std::size_t>(i)]->wait_for(kEver);
    ASSERT_NE(image, nullptr);
    expect_equal(*image, *images_[static_cast<std::size_t>(i)]);
    EXPECT_EQ(image->layout().shape(), shape);
    EXPECT_TRUE(tickets[static_cast<std::size_t>(i)]->is_done());
    EXPECT_EQ(tickets[static_cast<std::size_t>(i)]->bytes_total(), 512);
    EXPECT_EQ(tickets[static_cast<std::size_t>(i)]->bytes_read(), 512);
    EXPECT_EQ(store->find(std::to_string(i)), image);
  }
}

TEST_F(ImageReaderTest, OneFileForTwoIsOneImage) {
  const auto store = std::make_shared<HostStore>(host_device(), 2 * 512);
  ImageReader reader(store, 2);
  for (int round = 0; round < 100; ++round) {
    const auto first = reader.read(path(0));
    const auto second = reader.read(path(0));
    EXPECT_EQ(first->wait_for(kEver), second->wait_for(kEver));
    EXPECT_EQ(store->stats().images, 1);
    store->erase("0");
  }
}

TEST_F(ImageReaderTest, DroppedTicketsAreReadNevertheless) {
  const auto store = std::make_shared<HostStore>(host_device(), kFiles * 512);
  ImageReader reader(store, 1);
  reader.read(path(0));
  EXPECT_NE(reader.read(path(1))->wait_for(kEver), nullptr);  // behind the first
  EXPECT_NE(store->find("0"), nullptr);
}

// Without delay: the next build, in a store that is full otherwise, has no patience.
TEST_F(ImageReaderTest, AnImageIsIdleOnceTicketAndImageAreDropped) {
  const auto store = std::make_shared<HostStore>(host_device(), 512);
  ImageReader reader(store, 1);
  for (int round = 0; round < 500; ++round) {
    reader.read(path(round % 2))->wait_for(kEver);
    store->build(layout_of_bytes(512), "next");
  }
}

TEST_F(ImageReaderTest, AFailureIsItsTicketsAlone) {
  const auto store = std::make_shared<HostStore>(host_device(), kFiles * 512);
  ImageReader reader(store, 1);
  const auto missing = reader.read(folder_ / "none");
  const auto other =
      std::make_shared<const ModelShape>(std::vector<std::vector<Projection>>{{{"p", 1, 2}}});
  const auto mismatch = reader.read(path(0), other);
  const auto good = reader.read(path(0));
  EXPECT_NE(good->wait_for(kEver), nullptr);
  TOPPINGS_EXPECT_ERROR(missing->wait_for(kEver), io);
  TOPPINGS_EXPECT_ERROR(missing->wait_for(0ns), io);
  TOPPINGS_EXPECT_ERROR(mismatch->wait_for(kEver), mismatch);
  EXPECT_EQ(missing->bytes_total(), 0);
  missing->cancel();  // nothing to cancel any more
  TOPPINGS_EXPECT_ERROR(missing->wait_for(0ns), io);
}

TEST_F(ImageReaderTest, WaitsForRoomAsLongAsAsked) {
  const auto store = std::make_shared<HostStore>(host_device(), 512);
  auto held = testing::add_image(*store, layout_of_bytes(64), "held");
  ImageReader reader(store, 1);
  TOPPINGS_EXPECT_ERROR(reader.read(path(0))->wait_for(kEver), store_full);
  const auto ticket = reader.read(path(0), nullptr, kEver);
  EXPECT_EQ(ticket->wait_for(1ms), nullptr);
  EXPECT_FALSE(ticket->is_done());
  held.reset();
  EXPECT_NE(ticket->wait_for(kEver), nullptr);
}

TEST_F(ImageReaderTest, CancelsWhatWaitsAndWhatHasNotBegun) {
  const auto store = std::make_shared<HostStore>(host_device(), 512);
  const auto held = testing::add_image(*store, layout_of_bytes(64), "held");
  ImageReader reader(store, 1);
  const auto first = reader.read(path(0), nullptr, kEver);
  const auto second = reader.read(path(1), nullptr, kEver);
  while (store->stats().waiting == 0) std::this_thread::yield();
  second->cancel();
  TOPPINGS_EXPECT_ERROR(second->wait_for(0ns), cancelled);  // though the first isn't through
  EXPECT_FALSE(first->is_done());
  first->cancel();
  TOPPINGS_EXPECT_ERROR(first->wait_for(kEver), cancelled);
  EXPECT_EQ(store->stats().used_bytes, 64);
}

TEST_F(ImageReaderTest, TheDestructorCancels) {
  const auto store = std::make_shared<HostStore>(host_device(), 512);
  const auto held = testing::add_image(*store, layout_of_bytes(64), "held");
  std::vector<std::shared_ptr<ReadTicket>> tickets;
  {
    ImageReader reader(store, 2);
    for (int i = 0; i < 5; ++i) tickets.push_back(reader.read(path(i), nullptr, kEver));
    while (store->stats().waiting < 2) std::this_thread::yield();
  }
  for (const auto& ticket : tickets) {
    EXPECT_TRUE(ticket->is_done());
    TOPPINGS_EXPECT_ERROR(ticket->wait_for(kEver), cancelled);
  }
  EXPECT_EQ(store->stats().used_bytes, 64);
}

TEST_F(ImageReaderTest, RefusesNonsense) {
  const auto store = std::make_shared<HostStore>(host_device(), 512);
  TOPPINGS_EXPECT_ERROR(ImageReader(store, 0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(ImageReader(nullptr, 1), invalid_argument);
}

// More images than fit, asked for by several threads that cancel, wait, and look into what they
// got.
TEST_F(ImageReaderTest, SurvivesThreads) {
  const auto store = std::make_shared<HostStore>(host_device(), 5 * 512);
  std::atomic<int> broken = 0;
  std::atomic<int> read = 0;
  std::atomic<int> cancelled = 0;
  {
    ImageReader reader(store, 2);
    const auto work = [&](std::uint64_t seed) {
      std::mt19937_64 random(seed);
      for (int step = 0; step < 300; ++step) {
        const std::size_t i = random() % kFiles;
        const auto ticket = reader.read(path(static_cast<int>(i)), nullptr, kEver);
        if (random() % 4 == 0) std::thread([ticket] { ticket->cancel(); }).join();
        try {
          const auto image = ticket->wait_for(kEver);
          ++read;
          if (std::memcmp(image->layer_data(0), images_[i]->layer_data(0), 512) != 0) ++broken;
        } catch (const Error& error) {
          error.status() == Status::cancelled ? ++cancelled : ++broken;
        }
        if (random() % 8 == 0) store->erase(std::to_string(i));
      }
    };
    std::vector<std::thread> threads;
    for (std::uint64_t seed = 1; seed <= 3; ++seed) threads.emplace_back(work, seed);
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_EQ(broken, 0);
  EXPECT_GT(read, 300);
  EXPECT_GT(cancelled, 0);
  EXPECT_EQ(store->stats().used_bytes, store->stats().images * 512);
}

}  // namespace
}  // namespace toppings
