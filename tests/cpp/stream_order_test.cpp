// SPDX-License-Identifier: Apache-2.0
// Loading for a device whose streams run behind the host: tables and layers are ordered by streams.
#include <toppings/loader.h>

#include <chrono>
#include <cstring>
#include <thread>

#include "forwarding_device.h"
#include "testing.h"

namespace toppings {
namespace {

using testing::add_image;
using testing::RemoteDevice;
using testing::small_shape;

constexpr std::chrono::seconds kPatience{20};

class StreamOrderTest : public ::testing::Test {
 protected:
  static constexpr std::int64_t kLayerBytes = 1 << 16;

  int acquire(const std::string& digest, std::int64_t rank = 16) {
    const AdapterLayout layout(shape_, DType::bf16, {{rank, rank}, {}, {rank}});
    return table_->acquire(add_image(store_, layout, digest, digest[0])).slot;
  }

  // What a kernel that runs in the stream now would read: rank of (row, slot), by a copy to memory
  // of our own that is ordered in the stream.
  std::int64_t rank_on_device(Stream& stream, int row, int slot) {
    std::int64_t cell[3];
    stream.copy(cell, table_->device_slots() + 3 * (row * table_->num_slots() + slot),
                sizeof(cell));
    stream.synchronize();
    return cell[2];
  }

  std::shared_ptr<const ModelShape> shape_ = small_shape();
  // 16 ranks of the first layer take 6 ms.
  std::shared_ptr<Device> device_ =
      std::make_shared<RemoteDevice>(host_device(HostLink{.bytes_per_second = 5e5}));
  HostStore store_{device_, 1 << 22};
  std::shared_ptr<Arena> arena_ = std::make_shared<Arena>(device_, 3, kLayerBytes, DType::bf16);
  std::shared_ptr<SlotTable> table_ = std::make_shared<SlotTable>(shape_, arena_, 4);
  std::unique_ptr<Stream> stream_ = device_->make_stream();
};

TEST_F(StreamOrderTest, UploadsTheTables) {
  EXPECT_NE(table_->device_slots(), table_->slots().data());
  const int slot = acquire("a");
  table_->publish(slot, 0);
  EXPECT_EQ(rank_on_device(*stream_, 0, slot), 0);
  table_->upload(*stream_);
  EXPECT_EQ(rank_on_device(*stream_, 0, slot), 16);
  EXPECT_EQ(rank_on_device(*stream_, 2, slot), 0);
  table_->publish(slot, 2);
  table_->upload(*stream_, 0);
  EXPECT_EQ(rank_on_device(*stream_, 2, slot), 0);
  table_->upload(*stream_, 2);
  EXPECT_EQ(rank_on_device(*stream_, 2, slot), 16);
  const std::size_t bytes = table_->slots().size_bytes();
  EXPECT_EQ(std::memcmp(table_->device_slots(), table_->slots().data(), bytes), 0);
  EXPECT_EQ(
      std::memcmp(table_->device_scales(), table_->scales().data(), table_->scales().size_bytes()),
      0);
  TOPPINGS_EXPECT_ERROR(table_->upload(*stream_, 3), invalid_argument);
}

TEST_F(StreamOrderTest, AnEvictedSlotIsClearedAtTheNextUpload) {
  SlotTable table(shape_, arena_, 1);
  const AdapterLayout layout(shape_, DType::bf16, {{16, 16}, {}, {16}});
  const int slot = table.acquire(add_image(store_, layout, "a")).slot;
  table.publish(slot, 0);
  table.upload(*stream_);
  table.release(slot);
  EXPECT_EQ(table.acquire(add_image(store_, layout, "b")).slot, slot);
  table.upload(*stream_);
  stream_->synchronize();
  EXPECT_EQ(std::memcmp(table.device_slots(), table.slots().data(), table.slots().size_bytes()), 0);
  EXPECT_EQ(table.device_slots()[2], 0);
}

TEST_F(StreamOrderTest, WaitingForALayerDoesntHoldTheHost) {
  Loader loader(table_);
  const int slot = acquire("a");
  Ticket ticket = loader.load(slot);
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::byte> seen(static_cast<std::size_t>(kLayerBytes));
  ticket.wait(0, *stream_);
  ticket.wait(2, *stream_);
  const auto image = table_->image(slot);
  const auto bytes = static_cast<std::size_t>(image->layout().layer_bytes(2));
  stream_->copy(seen.data(), table_->layer_data(slot, 2), bytes);
  const auto enqueued = std::chrono::steady_clock::now() - start;
  EXPECT_FALSE(ticket.has_arrived(2));  // else this test shows nothing
  EXPECT_LT(enqueued, std::chrono::milliseconds(5));
  EXPECT_EQ(rank_on_device(*stream_, 2, slot), 16);  // synchronizes
  EXPECT_EQ(std::memcmp(seen.data(), image->layer_data(2), bytes), 0);
  EXPECT_TRUE(ticket.wait_for_all(kPatience));
  EXPECT_EQ(ticket.status(), LoadStatus::loaded);
}

TEST_F(StreamOrderTest, WaitingForALayerPutsItFirst) {
  Loader loader(table_);
  Ticket other = loader.load(acquire("a", 40), LoadPriority::urgent);
  Ticket ticket = loader.load(acquire("b", 8), LoadPriority::prefetch);
  ticket.wait(2, *stream_);
  stream_->synchronize();
  EXPECT_TRUE(ticket.wait_for(2, std::chrono::milliseconds(5)));
  EXPECT_LT(other.num_arrived(), 3);
  EXPECT_TRUE(other.wait_for_all(kPatience));
}

TEST_F(StreamOrderTest, AfterACancelledLoadOfTheSlot) {
  Loader loader(table_);
  const int slot = acquire("a");
  {
    Ticket ticket = loader.load(slot);
    ticket.cancel();
  }
  Ticket ticket = loader.load(slot);
  ticket.wait(2, *stream_);
  stream_->synchronize();
  const auto image = table_->image(slot);
  EXPECT_EQ(std::memcmp(table_->layer_data(slot, 2), image->layer_data(2),
                        static_cast<std::size_t>(image->layout().layer_bytes(2))),
            0);
  EXPECT_TRUE(ticket.wait_for_all(kPatience));
}

}  // namespace
}  // namespace toppings
