// SPDX-License-Identifier: Apache-2.0
#include <toppings/host_store.h>

#include <atomic>
#include <limits>
#include <thread>

#include "testing.h"

namespace toppings {
namespace {

using testing::add_image;
using testing::layout_of_bytes;

bool has(HostStore& store, const std::string& digest) { return store.find(digest) != nullptr; }

TEST(HostStore, CountsBytesUntilTheLastHolderLetsGo) {
  HostStore store(host_device(), 1024);
  {
    const ImageBuilder dropped = store.build(layout_of_bytes(512), "a");
    EXPECT_EQ(store.stats().used_bytes, 512);
    EXPECT_EQ(store.stats().images, 0);
  }
  EXPECT_EQ(store.stats().used_bytes, 0);
  auto image = add_image(store, layout_of_bytes(256), "a");
  EXPECT_EQ(store.find("a"), image);
  EXPECT_EQ(store.stats().images, 1);
  EXPECT_TRUE(store.erase("a"));
  EXPECT_FALSE(store.erase("a"));
  EXPECT_EQ(store.find("a"), nullptr);
  EXPECT_EQ(store.stats().used_bytes, 256);
  image.reset();
  EXPECT_EQ(store.stats().used_bytes, 0);
  EXPECT_EQ(store.stats().evictions, 0);
}

TEST(HostStore, EvictsTheLeastRecentlyUsed) {
  HostStore store(host_device(), 3 * 64);
  for (const char* digest : {"a", "b", "c"}) add_image(store, layout_of_bytes(64), digest);
  EXPECT_TRUE(has(store, "a"));  // a use: b is the oldest now
  add_image(store, layout_of_bytes(64), "d");
  EXPECT_FALSE(has(store, "b"));
  EXPECT_TRUE(has(store, "a") && has(store, "c") && has(store, "d"));
  EXPECT_EQ(store.stats().evictions, 1);
  EXPECT_EQ(store.stats().used_bytes, 3 * 64);
}

TEST(HostStore, NeverEvictsWhatIsInUse) {
  HostStore store(host_device(), 3 * 64);
  const auto a = add_image(store, layout_of_bytes(64), "a");
  add_image(store, layout_of_bytes(64), "b");
  add_image(store, layout_of_bytes(64), "c");
  add_image(store, layout_of_bytes(128), "d");
  EXPECT_EQ(store.find("a"), a);
  EXPECT_FALSE(has(store, "b") || has(store, "c"));
}

TEST(HostStore, EvictsNothingWhenAllOfItWouldNotDo) {
  HostStore store(host_device(), 4 * 64);
  const auto a = add_image(store, layout_of_bytes(128), "a");
  add_image(store, layout_of_bytes(64), "b");
  TOPPINGS_EXPECT_ERROR(store.build(layout_of_bytes(192), "c"), store_full);
  EXPECT_TRUE(has(store, "b"));
  EXPECT_EQ(store.stats().evictions, 0);
  EXPECT_EQ(store.stats().used_bytes, 192);
}

TEST(HostStore, SparesWhatALargerVictimMakesSuperfluous) {
  HostStore store(host_device(), 4 * 64);
  add_image(store, layout_of_bytes(64), "small");
  add_image(store, layout_of_bytes(192), "large");
  add_image(store, layout_of_bytes(128), "new");
  EXPECT_TRUE(has(store, "small") && has(store, "new"));
  EXPECT_FALSE(has(store, "large"));
  EXPECT_EQ(store.stats().evictions, 1);
}

TEST(HostStore, ErasedImagesStillCountWhileHeld) {
  HostStore store(host_device(), 2 * 64);
  auto a = add_image(store, layout_of_bytes(128), "a");
  store.erase("a");
  TOPPINGS_EXPECT_ERROR(store.build(layout_of_bytes(64), "b"), store_full);
  a.reset();
  add_image(store, layout_of_bytes(128), "b");
}

TEST(HostStore, KeepsTheFirstImageOfADigest) {
  HostStore store(host_device(), 1024);
  const auto first = add_image(store, layout_of_bytes(64), "a", 1);
  const auto second = add_image(store, layout_of_bytes(64), "a", 2);
  EXPECT_EQ(first, second);
  EXPECT_EQ(store.stats().used_bytes, 64);
  EXPECT_EQ(store.stats().images, 1);
}

TEST(HostStore, ImagesAndBuildersOutliveIt) {
  std::shared_ptr<const Image> image;
  std::unique_ptr<ImageBuilder> builder;
  {
    HostStore store(host_device(), 1024);
    image = add_image(store, layout_of_bytes(64), "a");
    builder = std::make_unique<ImageBuilder>(store.build(layout_of_bytes(64), "b"));
  }
  EXPECT_NE(image->layer_data(0)[0], std::byte{0xFF});
  testing::fill(*builder, 1);
  HostStore other(host_device(), 1024);
  TOPPINGS_EXPECT_ERROR(other.insert(std::move(*builder)), invalid_argument);
}

TEST(HostStore, RefusesNonsense) {
  TOPPINGS_EXPECT_ERROR(HostStore(host_device(), 0), invalid_argument);
  TOPPINGS_EXPECT_ERROR(HostStore(nullptr, 1), invalid_argument);
  HostStore store(host_device(), 128);
  TOPPINGS_EXPECT_ERROR(store.build(layout_of_bytes(64), ""), invalid_argument);
  TOPPINGS_EXPECT_ERROR(store.build(layout_of_bytes(192), "a"), invalid_argument);
  HostStore boundless(host_device(), std::numeric_limits<std::int64_t>::max());
  add_image(boundless, layout_of_bytes(64), "a");
  add_image(boundless, layout_of_bytes(64), "b");
}

// Fails every other allocation.
class FlakyDevice final : public Device {
 public:
  std::string_view name() const noexcept override { return "flaky"; }
  void* allocate(std::size_t bytes) override {
    if (count_++ % 2 == 0) throw Error(Status::out_of_memory, "memory: expected some, got none");
    return host_device()->allocate(bytes);
  }
  void deallocate(void* data, std::size_t bytes) noexcept override {
    host_device()->deallocate(data, bytes);
  }
  void* allocate_host(std::size_t bytes) override { return allocate(bytes); }
  void deallocate_host(void* data, std::size_t bytes) noexcept override { deallocate(data, bytes); }
  void copy(void* dst, const void* src, std::size_t bytes) override {
    std::memcpy(dst, src, bytes);
  }

 private:
  int count_ = 0;
};

TEST(HostStore, GivesBackWhatTheSystemRefused) {
  HostStore store(std::make_shared<FlakyDevice>(), 64);
  TOPPINGS_EXPECT_ERROR(store.build(layout_of_bytes(64), "a"), out_of_memory);
  EXPECT_EQ(store.stats().used_bytes, 0);
  add_image(store, layout_of_bytes(64), "a");
}

// Threads find, build, erase and hold in a store that has room for a third of the images; whoever
// holds one checks that its bytes are still its own.
TEST(HostStore, SurvivesThreads) {
  constexpr int kDigests = 24;
  constexpr int kSteps = 3'000;
  constexpr std::int64_t kBudget = 8 * 512;
  HostStore store(host_device(), kBudget);
  std::atomic<int> broken = 0;
  std::atomic<int> built = 0;
  const auto work = [&](std::uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<std::shared_ptr<const Image>> held(2);
    for (int step = 0; step < kSteps; ++step) {
      const int number = static_cast<int>(random() % kDigests);
      const std::string digest = std::to_string(number);
      std::shared_ptr<const Image> image = store.find(digest);
      if (image == nullptr) {
        try {
          ImageBuilder builder = store.build(layout_of_bytes(512), digest);
          const std::vector<float> values(64, static_cast<float>(number));
          builder.set(0, 0, values.data(), values.data(), DType::f32, 1);
          image = store.insert(std::move(builder));
          ++built;
        } catch (const Error& error) {
          if (error.status() != Status::store_full) ++broken;
          held[0].reset();
          continue;
        }
      }
      float value = 0;
      std::memcpy(&value, image->layer_data(0) + 4 * (random() % 128), 4);
      if (value != static_cast<float>(number) || image->digest() != digest) ++broken;
      if (store.stats().used_bytes > kBudget) ++broken;
      held[random() % held.size()] = std::move(image);
      if (random() % 50 == 0) store.erase(digest);
    }
  };
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 1; seed <= 3; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(broken, 0);
  EXPECT_GT(built, kDigests);
  const HostStore::Stats stats = store.stats();
  EXPECT_EQ(stats.used_bytes, stats.images * 512);
}

}  // namespace
}  // namespace toppings
