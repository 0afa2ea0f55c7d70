// SPDX-License-Identifier: Apache-2.0
#include <toppings/host_store.h>

#include <atomic>
#include <chrono>
#include <limits>
#include <optional>
#include <span>
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

// Main memory that isn't used in place, and from which an allocation may fail.
class OtherDevice final : public Device {
 public:
  explicit OtherDevice(bool is_flaky = false) : is_flaky_(is_flaky) {}

  DeviceKind kind() const noexcept override { return main_->kind(); }
  int index() const noexcept override { return 1; }
  std::string_view name() const noexcept override { return "other"; }
  bool is_in_place() const noexcept override { return false; }

  void* allocate(std::size_t bytes) override {
    if (is_flaky_ && count_++ % 2 == 0) {
      throw Error(Status::out_of_memory, "memory: expected some, got none");
    }
    return main_->allocate(bytes);
  }
  void deallocate(void* data, std::size_t bytes) noexcept override {
    main_->deallocate(data, bytes);
  }
  void* allocate_host(std::size_t bytes) override { return allocate(bytes); }
  void deallocate_host(void* data, std::size_t bytes) noexcept override { deallocate(data, bytes); }
  void page_lock(void*, std::size_t) override {}
  void page_unlock(void*) noexcept override {}
  std::unique_ptr<Stream> make_stream() override { return main_->make_stream(); }
  std::unique_ptr<Event> make_event() override { return main_->make_event(); }
  std::unique_ptr<Stream> wrap_stream(void* native) override { return main_->wrap_stream(native); }
  void copy(void* dst, const void* src, std::size_t bytes) override {
    main_->copy(dst, src, bytes);
  }

 private:
  const std::shared_ptr<Device> main_ = host_device();
  const bool is_flaky_;
  int count_ = 0;
};

TEST(HostStore, GivesBackWhatTheSystemRefused) {
  HostStore store(std::make_shared<OtherDevice>(true), 64);
  TOPPINGS_EXPECT_ERROR(store.build(layout_of_bytes(64), "a"), out_of_memory);
  EXPECT_EQ(store.stats().used_bytes, 0);
  add_image(store, layout_of_bytes(64), "a");
}

TEST(HostStore, PutsAllImagesOfADeviceInPlaceIntoOneRegion) {
  HostStore store(host_device(), 1 << 20);
  ASSERT_TRUE(store.device()->is_in_place());
  const std::span<const std::byte> region = store.region();
  EXPECT_GT(region.size(), std::size_t{1} << 20);
  std::vector<std::shared_ptr<const Image>> images;
  for (int i = 0; i < 40; ++i) {
    images.push_back(add_image(store, layout_of_bytes(64 * (i + 1)), std::to_string(i),
                               static_cast<std::uint64_t>(i)));
    const std::byte* data = images.back()->layer_data(0);
    EXPECT_GE(data, region.data());
    EXPECT_LE(data + images.back()->layout().bytes(), region.data() + region.size());
    EXPECT_EQ((data - region.data()) % kBlockAlignment, 0);
  }
  EXPECT_EQ(store.region().data(), region.data());
  const auto other = std::make_shared<OtherDevice>();
  HostStore elsewhere(other, 1 << 20);
  EXPECT_EQ(elsewhere.device(), other);
  EXPECT_TRUE(elsewhere.region().empty());
  EXPECT_EQ(*add_image(elsewhere, layout_of_bytes(64), "a", 0)->layer_data(0),
            *images[0]->layer_data(0));
}

// Images of very different sizes come and go for long; the budget is always what decides.
TEST(HostStore, HolesInTheRegionNeverFailABuild) {
  constexpr std::int64_t kBudget = 48 << 20;
  HostStore store(host_device(), kBudget);
  std::mt19937_64 random(7);
  std::vector<ImageBuilder> held;
  std::int64_t bytes = 0;
  for (int step = 0; step < 4'000; ++step) {
    const std::int64_t size = std::int64_t{64} << random() % 18;  // 64 B to 8 MiB
    while (bytes + size > kBudget) {
      const std::size_t victim = random() % held.size();
      bytes -= held[victim].layout().bytes();
      std::swap(held[victim], held.back());
      held.pop_back();
    }
    held.push_back(store.build(layout_of_bytes(size), "x"));
    bytes += size;
    ASSERT_EQ(store.stats().used_bytes, bytes);
  }
}

TEST(HostStore, OneDigestHasOneLayout) {
  HostStore store(host_device(), 4096);
  const auto first = add_image(store, layout_of_bytes(64), "a");
  const auto shape = first->layout().shape();
  ImageBuilder half = store.build(AdapterLayout(shape, DType::f16, {{8}}), "a");
  testing::fill(half, 1);
  TOPPINGS_EXPECT_ERROR(store.insert(std::move(half)), invalid_argument);
  TOPPINGS_EXPECT_ERROR(add_image(store, layout_of_bytes(128), "a"), invalid_argument);
  EXPECT_EQ(store.stats().used_bytes, 64);
  EXPECT_EQ(store.find("a"), first);
  const auto again = std::make_shared<const ModelShape>(*shape);
  EXPECT_EQ(add_image(store, AdapterLayout(again, DType::f32, {{8}}), "a"), first);
}

TEST(HostStore, WeakPointersNeverReviveAnIdleImage) {
  HostStore store(host_device(), 64);
  auto image = add_image(store, layout_of_bytes(64), "a");
  const std::weak_ptr<const Image> weak = image;
  EXPECT_NE(weak.lock(), nullptr);
  image.reset();
  EXPECT_EQ(weak.lock(), nullptr);
  EXPECT_TRUE(has(store, "a"));
}

// A call of build() on a thread of its own.
class Waiting {
 public:
  Waiting(HostStore& store, std::int64_t bytes, std::chrono::nanoseconds patience)
      : thread_([this, &store, bytes, patience] {
          try {
            const ImageBuilder builder = store.build(layout_of_bytes(bytes), "waiting", patience);
            order_ = ++ends_;
          } catch (const Error& error) {
            status_ = error.status();
          }
        }) {}

  void join() { thread_.join(); }
  int order() const { return order_; }
  std::optional<Status> status() const { return status_; }

 private:
  static inline std::atomic<int> ends_ = 0;
  int order_ = 0;
  std::optional<Status> status_;
  std::thread thread_;
};

// Gives up after a while, for one in the line may have given up before.
void wait_for_line(const HostStore& store, int length) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (store.stats().waiting < length && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::yield();
  }
}

TEST(HostStore, WaitsUntilTheLastHolderLetsGo) {
  HostStore store(host_device(), 4 * 64);
  auto image = add_image(store, layout_of_bytes(192), "a");
  auto second = image;
  Waiting waiting(store, 128, std::chrono::hours(1));
  wait_for_line(store, 1);
  image.reset();
  EXPECT_EQ(store.stats().evictions, 0);  // in use still
  second.reset();
  waiting.join();
  EXPECT_EQ(waiting.status(), std::nullopt);
  EXPECT_EQ(store.stats().evictions, 1);
}

TEST(HostStore, WaitsForErasedImagesAndBuilders) {
  HostStore store(host_device(), 4 * 64);
  auto image = add_image(store, layout_of_bytes(192), "a");
  store.erase("a");
  Waiting first(store, 128, std::chrono::hours(1));
  wait_for_line(store, 1);
  image.reset();
  first.join();
  EXPECT_EQ(first.status(), std::nullopt);

  auto builder = std::make_unique<ImageBuilder>(store.build(layout_of_bytes(192), "b"));
  Waiting second(store, 128, std::chrono::hours(1));
  wait_for_line(store, 1);
  builder.reset();
  second.join();
  EXPECT_EQ(second.status(), std::nullopt);
}

TEST(HostStore, WaitsNoLongerThanItsPatience) {
  HostStore store(host_device(), 2 * 64);
  const auto image = add_image(store, layout_of_bytes(128), "a");
  const auto start = std::chrono::steady_clock::now();
  constexpr std::chrono::milliseconds kPatience(30);
  TOPPINGS_EXPECT_ERROR(store.build(layout_of_bytes(64), "b", kPatience), store_full);
  EXPECT_GE(std::chrono::steady_clock::now() - start, kPatience);
  TOPPINGS_EXPECT_ERROR(store.build(layout_of_bytes(64), "b", -kPatience), store_full);
  TOPPINGS_EXPECT_ERROR(store.build(layout_of_bytes(192), "b", std::chrono::hours(1)),
                        invalid_argument);
}

TEST(HostStore, ThoseWhoWaitGetRoomInTheirOrder) {
  HostStore store(host_device(), 8 * 64);
  auto image = add_image(store, layout_of_bytes(7 * 64), "a");
  const auto forever = std::chrono::nanoseconds::max();
  Waiting first(store, 8 * 64, forever);
  wait_for_line(store, 1);
  TOPPINGS_EXPECT_ERROR(store.build(layout_of_bytes(64), "b"), store_full);  // though it would fit
  Waiting second(store, 8 * 64, forever);
  wait_for_line(store, 2);
  Waiting third(store, 8 * 64, forever);
  wait_for_line(store, 3);
  image.reset();
  for (Waiting* waiting : {&first, &second, &third}) waiting->join();
  EXPECT_LT(first.order(), second.order());
  EXPECT_LT(second.order(), third.order());
  EXPECT_EQ(store.stats().waiting, 0);
}

// One who gives up lets those behind him in.
TEST(HostStore, AnImpatientFirstOneWakesTheNext) {
  HostStore store(host_device(), 8 * 64);
  const auto image = add_image(store, layout_of_bytes(7 * 64), "a");
  Waiting large(store, 8 * 64, std::chrono::milliseconds(200));
  wait_for_line(store, 1);
  Waiting small(store, 64, std::chrono::hours(1));
  large.join();
  small.join();
  EXPECT_EQ(large.status(), Status::store_full);
  EXPECT_EQ(small.status(), std::nullopt);
}

// Every thread needs most of the budget again and again, and lets go in all the ways there are. A
// lost wake-up would keep one of them waiting for the whole hour.
TEST(HostStore, NoWakeUpIsLost) {
  HostStore store(host_device(), 8 * 64);
  std::atomic<int> broken = 0;
  const auto work = [&](std::uint64_t seed) {
    std::mt19937_64 random(seed);
    for (int step = 0; step < 2'000; ++step) {
      const std::string digest = std::to_string(random() % 3);
      try {
        ImageBuilder builder = store.build(layout_of_bytes(64 * 5), digest, std::chrono::hours(1));
        if (step % 4 == 0) continue;  // drops the builder
        testing::fill(builder, 1);
        auto image = store.insert(std::move(builder));
        if (step % 4 == 1) store.erase(digest);
        if (step % 4 == 2) std::this_thread::yield();
      } catch (const Error&) {
        ++broken;
      }
    }
  };
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 1; seed <= 4; ++seed) threads.emplace_back(work, seed);
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(broken, 0);
  EXPECT_LE(store.stats().images, 1);
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
