// SPDX-License-Identifier: Apache-2.0
// Which copy the loader enqueues when, on a device whose copies run only when the test says so.
#include <toppings/loader.h>

#include <chrono>
#include <future>
#include <map>
#include <numeric>
#include <optional>
#include <thread>

#include "gate_device.h"
#include "testing.h"

namespace toppings {
namespace {

using testing::GateDevice;
using namespace std::chrono_literals;

constexpr int kLayers = 6;
constexpr std::int64_t kUnit = 64;  // bytes of a layer of an adapter of size 1

struct Place {
  std::string digest;
  int layer;
  bool operator==(const Place&) const = default;
};

void PrintTo(const Place& place, std::ostream* out) { *out << place.digest << place.layer; }

std::vector<Place> layers_of(const std::string& digest, std::vector<int> layers) {
  std::vector<Place> places;
  for (const int layer : layers) places.push_back({digest, layer});
  return places;
}

class LoaderOrderTest : public ::testing::Test {
 protected:
  explicit LoaderOrderTest(DeviceKind kind = DeviceKind::host)
      : device_(std::make_shared<GateDevice>(kind)),
        arena_(std::make_shared<Arena>(device_, kLayers, 100 * kUnit, DType::f32)),
        table_(std::make_shared<SlotTable>(shape_, arena_, 8)) {}

  // A failed test must not hang in a destructor that waits for copies.
  ~LoaderOrderTest() override { device_->open(); }

  void start(LoaderOptions options) { loader_ = std::make_unique<Loader>(table_, options); }

  // One stream, no more than two copies ahead: the plainest order.
  void start() { start({.num_streams = 1, .window_seconds = 0}); }

  // Pinned. All layers have size * kUnit bytes.
  int acquire(const std::string& digest, std::int64_t size = 1) {
    const AdapterLayout layout(shape_, DType::f32, testing::Ranks(kLayers, {size}));
    images_[digest] = testing::add_image(store_, layout, digest, digest[0]);
    return table_->acquire(images_[digest]).slot;
  }

  std::shared_ptr<Ticket> load(const std::string& digest,
                               LoadPriority priority = LoadPriority::normal,
                               std::vector<int> order = {}, std::int64_t size = 1) {
    const int slot = acquire(digest, size);
    return load_slot(slot, priority, std::move(order));
  }

  std::shared_ptr<Ticket> load_slot(int slot, LoadPriority priority = LoadPriority::normal,
                                    std::vector<int> order = {}) {
    return std::shared_ptr<Ticket>(new Ticket(loader_->load(slot, priority, std::move(order))));
  }

  Place place_of(const GateDevice::Copy& copy) const {
    for (const auto& [digest, image] : images_) {
      for (int layer = 0; layer < kLayers; ++layer) {
        if (copy.src == image->layer_data(layer)) return {digest, layer};
      }
    }
    return {"?", -1};
  }

  std::vector<Place> places(const std::vector<GateDevice::Copy>& copies) const {
    std::vector<Place> places;
    for (const auto& copy : copies) places.push_back(place_of(copy));
    return places;
  }

  std::vector<Place> log() const { return places(device_->log()); }

  std::vector<Place> log_from(std::size_t first) const {
    std::vector<Place> all = log();
    return {all.begin() + static_cast<std::ptrdiff_t>(std::min(first, all.size())), all.end()};
  }

  // Runs the oldest copy of a stream, and returns when the loader has seen it and enqueued what it
  // will. The loader does both under one lock, which stats() takes as well.
  void step(int stream = 0) {
    const std::int64_t layers = loader_->stats().layers;
    ASSERT_TRUE(device_->complete(stream));
    const auto deadline = std::chrono::steady_clock::now() + 20s;
    while (loader_->stats().layers == layers) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline) << "the loader doesn't see the copy";
      std::this_thread::sleep_for(20us);
    }
  }

  void run_all(int num_streams = 1) {
    for (bool moved = true; moved;) {
      moved = false;
      for (int stream = 0; stream < num_streams; ++stream) {
        while (!device_->pending(stream).empty()) {
          step(stream);
          if (HasFatalFailure()) return;
          moved = true;
        }
      }
    }
  }

  void expect_bytes(const std::string& digest) {
    const int slot = table_->find(digest);
    ASSERT_GE(slot, 0) << digest;
    const auto& image = images_.at(digest);
    for (int layer = 0; layer < kLayers; ++layer) {
      EXPECT_TRUE(table_->is_published(slot, layer)) << digest << layer;
      EXPECT_EQ(std::memcmp(table_->layer_data(slot, layer), image->layer_data(layer),
                            static_cast<std::size_t>(image->layout().layer_bytes(layer))),
                0)
          << digest << layer;
    }
  }

  std::int64_t pins(const std::string& digest) {
    std::int64_t pins = 0;
    const int slot = table_->find(digest);
    for (;; ++pins) {
      try {
        table_->release(slot);
      } catch (const Error&) {
        break;
      }
    }
    for (std::int64_t pin = 0; pin < pins; ++pin) table_->acquire(images_.at(digest));
    return pins;
  }

  std::shared_ptr<GateDevice> device_;
  std::shared_ptr<const ModelShape> shape_ = std::make_shared<const ModelShape>(
      std::vector<std::vector<Projection>>(kLayers, {{"p", 8, 8}}));
  HostStore store_{host_device(), 1 << 20};
  std::map<std::string, std::shared_ptr<const Image>> images_;
  std::shared_ptr<Arena> arena_;
  std::shared_ptr<SlotTable> table_;
  std::unique_ptr<Loader> loader_;
};

TEST_F(LoaderOrderTest, KeepsTheOrderAskedFor) {
  start();
  const std::vector<int> order{4, 5, 3, 0, 2, 1};
  const auto ticket = load("a", LoadPriority::normal, order);
  run_all();
  EXPECT_EQ(log(), layers_of("a", order));
  EXPECT_EQ(ticket->status(), LoadStatus::loaded);
  expect_bytes("a");
}

TEST_F(LoaderOrderTest, PublishesALayerWhenItIsThereAndNotBefore) {
  start();
  const auto ticket = load("a");
  for (int layer = 0; layer < kLayers; ++layer) {
    for (int other = 0; other < kLayers; ++other) {
      EXPECT_EQ(table_->is_published(ticket->slot(), other), other < layer);
      EXPECT_EQ(ticket->has_arrived(other), other < layer);
    }
    EXPECT_EQ(ticket->num_arrived(), layer);
    EXPECT_FALSE(ticket->wait_for(layer, 0ns));
    step();
  }
  EXPECT_EQ(ticket->status(), LoadStatus::loaded);
}

TEST_F(LoaderOrderTest, OneLoadStaysInOneStream) {
  start({.num_streams = 3, .window_seconds = 0});
  load("a");
  const int stream = device_->log().at(0).stream;
  EXPECT_EQ(device_->pending(stream).size(), 2u);  // one under way, one behind it
  step(stream);
  EXPECT_EQ(device_->pending(stream).size(), 2u);
  run_all(3);
  ASSERT_EQ(device_->log().size(), static_cast<std::size_t>(kLayers));
  for (const auto& copy : device_->log()) EXPECT_EQ(copy.stream, stream);
}

TEST_F(LoaderOrderTest, DifferentLoadsUseDifferentStreams) {
  start({.num_streams = 2, .window_seconds = 0});
  load("a");
  load("b");
  EXPECT_EQ(device_->log().size(), 2u);  // on all streams together
  run_all(2);
  ASSERT_EQ(device_->log().size(), 2u * kLayers);
  std::map<std::string, int> streams;
  for (const auto& copy : device_->log()) {
    const auto [entry, is_new] = streams.try_emplace(place_of(copy).digest, copy.stream);
    EXPECT_EQ(entry->second, copy.stream);
  }
  EXPECT_NE(streams.at("a"), streams.at("b"));
}

TEST_F(LoaderOrderTest, EqualsShareByBytes) {
  start();
  const std::int64_t large = 5;
  load("a", LoadPriority::normal, {}, large);
  load("b");
  std::map<std::string, std::int64_t> bytes;
  std::map<std::string, int> left{{"a", kLayers}, {"b", kLayers}};
  run_all();
  const auto log = device_->log();
  ASSERT_EQ(log.size(), 2u * kLayers);
  // a began alone with two copies; b begins level with it.
  bytes["b"] = 2 * large * kUnit;
  for (std::size_t i = 0; i < log.size(); ++i) {
    const std::string digest = place_of(log[i]).digest;
    bytes[digest] += static_cast<std::int64_t>(log[i].bytes);
    --left[digest];
    if (i < 2) continue;
    if (left["a"] == 0 || left["b"] == 0) break;
    EXPECT_LE(std::abs(bytes["a"] - bytes["b"]), large * kUnit) << "copy " << i;
  }
}

TEST_F(LoaderOrderTest, ALayerInDemandGoesNext) {
  start();
  load("a");
  const auto b = load("b");
  const auto c = load("c");
  const std::size_t before = log().size();
  ASSERT_EQ(before, 2u);
  EXPECT_FALSE(b->wait_for(2, 0ns));
  for (int i = 0; i < 3; ++i) step();
  EXPECT_EQ(log_from(before), layers_of("b", {0, 1, 2}));
  run_all();
  // No longer in demand, b has had its share.
  EXPECT_NE(log_from(before + 3).at(0).digest, "b");
  EXPECT_EQ(log().size(), 3u * kLayers);
}

TEST_F(LoaderOrderTest, DemandGoesBeforeAnyPriority) {
  start();
  load("a", LoadPriority::urgent);
  const auto b = load("b", LoadPriority::prefetch, {5, 4, 3, 2, 1, 0});
  EXPECT_FALSE(b->wait_for(4, 0ns));
  run_all();
  const auto expected = layers_of("b", {5, 4});
  const auto after = log_from(2);
  EXPECT_EQ(std::vector(after.begin(), after.begin() + 2), expected);
  EXPECT_EQ(log_from(4 + kLayers - 2), layers_of("b", {3, 2, 1, 0}));
}

TEST_F(LoaderOrderTest, PrefetchGetsNothingWhileOthersWait) {
  for (const int num_streams : {1, 2}) {
    const std::string tag = std::to_string(num_streams);
    start({.num_streams = num_streams, .window_seconds = 0});
    const std::size_t before = device_->log().size();
    const int first_stream = before == 0 ? 0 : 1;  // the second loader's streams come later
    load("u" + tag, LoadPriority::urgent);
    load("p" + tag, LoadPriority::prefetch);
    load("n" + tag, LoadPriority::normal);
    for (int round = 0; round < 3 * kLayers; ++round) {
      for (int stream = first_stream; stream < first_stream + num_streams; ++stream) {
        if (!device_->pending(stream).empty()) step(stream);
      }
    }
    std::map<char, std::size_t> first;
    std::map<char, std::size_t> last;
    const auto places = log_from(before);
    ASSERT_EQ(places.size(), 3u * kLayers);
    for (std::size_t i = 0; i < places.size(); ++i) {
      first.try_emplace(places[i].digest[0], i);
      last[places[i].digest[0]] = i;
    }
    EXPECT_LT(last['u'], first['n']);
    EXPECT_LT(last['n'], first['p']);
  }
}

TEST_F(LoaderOrderTest, RaisingAPrefetchMovesIt) {
  start();
  load("a");
  load("b");
  const auto c = load("c", LoadPriority::prefetch);
  step();
  for (const Place& place : log()) EXPECT_NE(place.digest, "c");
  c->raise(LoadPriority::urgent);
  c->raise(LoadPriority::prefetch);  // never lowers
  const std::size_t before = log().size();
  run_all();
  const auto after = log_from(before);
  EXPECT_EQ(std::vector(after.begin(), after.begin() + kLayers),
            layers_of("c", {0, 1, 2, 3, 4, 5}));
}

TEST_F(LoaderOrderTest, TheWindowBoundsWhatIsAhead) {
  constexpr std::int64_t kSize = 4;
  constexpr double kCopies = 2.5;  // in the window
  const double seconds = kCopies * kSize * kUnit / GateDevice::kBytesPerSecond;
  start({.num_streams = 1, .window_seconds = seconds});
  load("a", LoadPriority::normal, {}, kSize);
  EXPECT_EQ(device_->pending(0).size(), 2u);  // the rate isn't known yet
  step();
  EXPECT_NEAR(loader_->stats().bytes_per_second, GateDevice::kBytesPerSecond, 1);
  EXPECT_EQ(device_->pending(0).size(), 3u);  // the third begins within the window
  step();
  EXPECT_EQ(device_->pending(0).size(), 3u);
  run_all();
  EXPECT_EQ(log(), layers_of("a", {0, 1, 2, 3, 4, 5}));
}

TEST_F(LoaderOrderTest, ASecondTicketJoins) {
  start();
  const auto first = load("a", LoadPriority::prefetch, {3, 2, 1, 0, 4, 5});
  load("b");
  const auto second = load_slot(first->slot(), LoadPriority::urgent, {0, 1, 2, 3, 4, 5});
  run_all();
  const auto all = log();
  EXPECT_EQ(std::vector(all.begin(), all.begin() + kLayers), layers_of("a", {3, 2, 1, 0, 4, 5}));
  EXPECT_EQ(all.size(), 2u * kLayers);
  EXPECT_EQ(first->status(), LoadStatus::loaded);
  EXPECT_EQ(second->status(), LoadStatus::loaded);
  EXPECT_EQ(loader_->stats().loads, 2);
  EXPECT_EQ(pins("a"), 1);
}

TEST_F(LoaderOrderTest, OneOfTwoTicketsCancels) {
  start();
  const auto first = load("a");
  const auto second = load_slot(first->slot());
  step();
  first->cancel();
  first->cancel();  // once
  EXPECT_EQ(first->status(), LoadStatus::cancelled);
  EXPECT_EQ(second->status(), LoadStatus::loading);
  TOPPINGS_EXPECT_ERROR(first->wait_for(kLayers - 1, 0ns), cancelled);
  TOPPINGS_EXPECT_ERROR(first->wait_for_all(0ns), cancelled);
  run_all();
  EXPECT_EQ(second->status(), LoadStatus::loaded);
  EXPECT_EQ(first->status(), LoadStatus::cancelled);  // it gave up, whatever came of the load
  EXPECT_EQ(loader_->stats().cancelled, 0);
  expect_bytes("a");
}

TEST_F(LoaderOrderTest, CancelledBeforeItsFirstCopy) {
  start();
  load("a");
  const auto b = load("b");
  EXPECT_EQ(log().size(), 2u);
  EXPECT_EQ(pins("b"), 2);
  b->cancel();
  EXPECT_EQ(b->status(), LoadStatus::cancelled);
  EXPECT_EQ(pins("b"), 1);
  TOPPINGS_EXPECT_ERROR(b->wait_for(0, 0ns), cancelled);
  run_all();
  EXPECT_EQ(log(), layers_of("a", {0, 1, 2, 3, 4, 5}));
  const auto again = load_slot(b->slot());
  run_all();
  EXPECT_EQ(log_from(kLayers), layers_of("b", {0, 1, 2, 3, 4, 5}));
  EXPECT_EQ(b->status(), LoadStatus::cancelled);
  EXPECT_EQ(again->status(), LoadStatus::loaded);
  expect_bytes("b");
}

// Loads again before (is_early) or after the copies under way have run: each layer is copied once.
TEST_F(LoaderOrderTest, CancelledAfterEachLayer) {
  start();
  for (const bool is_early : {false, true}) {
    for (int arrived = 0; arrived < kLayers; ++arrived) {
      const std::string digest = std::string(is_early ? "e" : "l") + std::to_string(arrived);
      SCOPED_TRACE(digest);
      const std::size_t before = log().size();
      const auto ticket = load(digest);
      for (int layer = 0; layer < arrived; ++layer) step();
      const std::size_t under_way = device_->pending(0).size();
      ticket->cancel();
      EXPECT_EQ(ticket->status(), LoadStatus::cancelled);
      std::shared_ptr<Ticket> again;
      if (is_early) again = load_slot(ticket->slot());
      EXPECT_EQ(device_->pending(0).size(), under_way);  // the same bytes are never sent twice
      for (std::size_t i = 0; i < under_way; ++i) step();
      if (!is_early) {
        EXPECT_TRUE(device_->pending(0).empty());
        EXPECT_EQ(ticket->num_arrived(), arrived + static_cast<int>(under_way));
        EXPECT_EQ(pins(digest), 1);
        again = load_slot(ticket->slot());
      }
      run_all();
      EXPECT_EQ(log_from(before), layers_of(digest, {0, 1, 2, 3, 4, 5}));
      EXPECT_EQ(again->status(), LoadStatus::loaded);
      EXPECT_EQ(pins(digest), 1);
      expect_bytes(digest);
      table_->release(ticket->slot());
    }
  }
  EXPECT_EQ(table_->stats().pinned, 0);
}

TEST_F(LoaderOrderTest, ManyCancelledLoadsOfOneSlot) {
  start();
  auto ticket = load("a");
  for (int i = 0; i < 5; ++i) {
    ticket->cancel();
    ticket = load_slot(ticket->slot());
  }
  EXPECT_EQ(log().size(), 2u);
  ticket->cancel();
  EXPECT_EQ(pins("a"), 2);  // the first load's copies are still under way
  run_all();
  EXPECT_EQ(pins("a"), 1);
  EXPECT_EQ(loader_->stats().cancelled, loader_->stats().loads);
  EXPECT_EQ(log(), layers_of("a", {0, 1}));
}

TEST_F(LoaderOrderTest, CancellingWakesWhoeverWaits) {
  start();
  const auto ticket = load("a");
  const auto wait = [&](int layer) {
    return std::async(std::launch::async, [&, layer]() -> std::optional<Status> {
      try {
        if (!ticket->wait_for(layer, 20s)) return Status::io;
      } catch (const Error& error) {
        return error.status();
      }
      return std::nullopt;
    });
  };
  auto under_way = wait(0);
  auto waiting = wait(kLayers - 1);
  auto all = std::async(std::launch::async, [&]() -> std::optional<Status> {
    try {
      if (!ticket->wait_for_all(20s)) return Status::io;
    } catch (const Error& error) {
      return error.status();
    }
    return std::nullopt;
  });
  std::this_thread::sleep_for(20ms);  // so that all of them wait, most likely
  ticket->cancel();
  ASSERT_EQ(waiting.wait_for(10s), std::future_status::ready);
  EXPECT_EQ(waiting.get(), Status::cancelled);
  run_all();
  ASSERT_EQ(under_way.wait_for(10s), std::future_status::ready);
  ASSERT_EQ(all.wait_for(10s), std::future_status::ready);
  EXPECT_EQ(all.get(), Status::cancelled);
  // Cancelled before it began to wait, it was refused; else the copy under way arrived.
  const auto status = under_way.get();
  EXPECT_TRUE(!status || *status == Status::cancelled);
}

TEST_F(LoaderOrderTest, TheLoadersEndCancelsItsLoads) {
  start();
  const auto a = load("a");
  const auto b = load("b");
  auto end = std::async(std::launch::async, [&] { loader_.reset(); });
  while (b->status() == LoadStatus::loading) std::this_thread::sleep_for(1ms);
  EXPECT_EQ(pins("b"), 1);
  EXPECT_EQ(end.wait_for(20ms), std::future_status::timeout);  // waits for copies under way
  EXPECT_TRUE(device_->complete(0));
  EXPECT_TRUE(device_->complete(0));
  ASSERT_EQ(end.wait_for(10s), std::future_status::ready);
  EXPECT_EQ(a->status(), LoadStatus::cancelled);
  EXPECT_EQ(a->num_arrived(), 2);
  EXPECT_EQ(pins("a"), 1);
  TOPPINGS_EXPECT_ERROR(a->wait_for(5, 20s), cancelled);
  TOPPINGS_EXPECT_ERROR(b->wait_for_all(20s), cancelled);
  b->cancel();
  b->raise(LoadPriority::urgent);
}

// The same with memory of a device's own: waits are in stream order.
class LoaderStreamOrderTest : public LoaderOrderTest {
 protected:
  static constexpr int kCompute = 1;

  LoaderStreamOrderTest() : LoaderOrderTest(DeviceKind::cuda) {
    start();
    compute_ = device_->make_stream();
  }
  ~LoaderStreamOrderTest() override { device_->open(); }

  // What a kernel in the stream would read: `bytes` of device memory, copied in stream order.
  template <class T>
  void read(Stream& stream, std::vector<T>& into, const void* from, std::size_t count) {
    into.assign(count, T{});
    stream.copy(into.data(), from, count * sizeof(T));
  }

  std::unique_ptr<Stream> compute_;
};

TEST_F(LoaderStreamOrderTest, TheHostDoesNotWait) {
  const auto ticket = load("a");
  const auto& image = images_.at("a");
  std::vector<std::vector<std::byte>> bytes(kLayers);
  std::vector<std::vector<std::int64_t>> rows(kLayers);
  const auto slots = static_cast<std::size_t>(table_->num_slots());
  for (int layer = 0; layer < kLayers; ++layer) {
    const auto l = static_cast<std::size_t>(layer);
    ticket->wait(layer, *compute_);
    read(*compute_, bytes[l], table_->layer_data(ticket->slot(), layer),
         static_cast<std::size_t>(image->layout().layer_bytes(layer)));
    read(*compute_, rows[l], table_->device_slots() + 3 * slots * l, 3 * slots);
  }
  EXPECT_EQ(device_->pending(0).size(), static_cast<std::size_t>(kLayers));  // the window or not
  EXPECT_FALSE(device_->complete(kCompute));
  for (int layer = 0; layer < kLayers; ++layer) {
    const auto l = static_cast<std::size_t>(layer);
    EXPECT_FALSE(device_->complete(kCompute));
    EXPECT_TRUE(device_->complete(0));
    while (device_->complete(kCompute)) {
    }
    EXPECT_EQ(std::memcmp(bytes[l].data(), image->layer_data(layer), bytes[l].size()), 0);
    EXPECT_EQ(rows[l][3 * static_cast<std::size_t>(ticket->slot()) + 2], 1) << "layer " << layer;
  }
  EXPECT_TRUE(ticket->wait_for_all(20s));
}

TEST_F(LoaderStreamOrderTest, CopiesInOrderUpToTheLayerWaitedFor) {
  load("a");
  const auto b = load("b", LoadPriority::prefetch, {3, 1, 0, 2, 4, 5});
  b->wait(0, *compute_);
  EXPECT_EQ(log_from(2).at(0), (Place{"b", 3}));
  std::vector<Place> copies;
  for (const Place& place : log()) {
    if (place.digest == "b") copies.push_back(place);
  }
  EXPECT_EQ(copies, layers_of("b", {3, 1, 0}));
}

TEST_F(LoaderStreamOrderTest, ACancelledTicketIsRefused) {
  const auto ticket = load("a");
  ticket->cancel();
  TOPPINGS_EXPECT_ERROR(ticket->wait(5, *compute_), cancelled);
}

// What one caller waits for in a stream isn't there yet for those who look on the host.
TEST_F(LoaderStreamOrderTest, HasArrivedMeansArrived) {
  const auto first = load("a");
  first->wait(0, *compute_);
  EXPECT_FALSE(first->has_arrived(0));
  first->cancel();
  const auto second = load_slot(first->slot());
  EXPECT_FALSE(second->has_arrived(0));
  EXPECT_FALSE(second->wait_for(0, 0ns));
  EXPECT_TRUE(device_->complete(0));
  EXPECT_TRUE(second->wait_for(0, 20s));
}

// Two requests that wait in one stream: neither makes the host wait, whatever is behind the gate.
TEST_F(LoaderStreamOrderTest, TheHostDoesNotWaitForAnothersUpload) {
  const auto a = load("a");
  const auto b = load("b");
  auto enqueued = std::async(std::launch::async, [&] {
    a->wait(0, *compute_);
    b->wait(0, *compute_);
  });
  EXPECT_EQ(enqueued.wait_for(2s), std::future_status::ready);
  device_->open();
  enqueued.get();
}

}  // namespace
}  // namespace toppings
