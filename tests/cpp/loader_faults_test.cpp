// SPDX-License-Identifier: Apache-2.0
// A device call fails, each in turn: whoever it concerns hears of it, nobody hangs, nothing stays
// pinned, and the same adapters load again and are right.
#include <toppings/loader.h>

#include <chrono>
#include <future>
#include <optional>
#include <thread>

#include "faults.h"
#include "testing.h"

namespace toppings {
namespace {

using testing::Call;
using testing::FaultyDevice;
using namespace std::chrono_literals;

constexpr auto kPatience = 20s;  // for what takes milliseconds
constexpr std::byte kPoison{0xA5};

// What became of a call that may fail: nothing when it succeeded.
using Outcome = std::optional<Status>;

template <class Function>
Outcome outcome_of(Function function) {
  try {
    function();
  } catch (const Error& error) {
    return error.status();
  }
  return std::nullopt;
}

struct Case {
  Call call;
  int nth;
  DeviceKind kind;
  bool lasts = false;

  std::string name() const {
    return std::string(testing::kCallNames[static_cast<std::size_t>(call)]) + " " +
           std::to_string(nth) + (lasts ? " and all after it" : "") +
           (kind == DeviceKind::cuda ? ", in stream order" : "");
  }
};

// Two loads at the same time, one of them with two tickets, and one more later.
class Scenario {
 public:
  static constexpr int kLayers = 5;
  static constexpr std::int64_t kLayerBytes = 4096;

  explicit Scenario(const Case& fault)
      : fault_(fault),
        device_(std::make_shared<FaultyDevice>(host_device(HostLink{5e9, latency(fault)}),
                                               fault.kind)) {}

  void run() {
    device_->plan().arm(fault_.call, fault_.nth, fault_.lasts);
    build();
    if (compute_ == nullptr) return;  // the device is gone for good
    load_all();
    has_fired_ = device_->plan().has_fired();
    device_->plan().disarm();
    check_nothing_is_pinned();
    if (::testing::Test::HasFatalFailure()) return;
    check_stats();
    if (!fault_.lasts) load_again();
    tear_down();
  }

  bool has_fired() const { return has_fired_ || device_->plan().has_fired(); }
  int failures() const { return failures_; }

 private:
  // A stream waits for layers only while they are on their way.
  static double latency(const Case& fault) {
    if (fault.call == Call::stream_wait) return 5e-3;
    return fault.kind == DeviceKind::cuda ? 1e-4 : 1e-6;
  }

  // Once more where it fails: one failure must leave nothing behind that stands in the way.
  template <class Function>
  void retry(Status expected, Function function) {
    const Outcome first = outcome_of(function);
    if (!first) return;
    EXPECT_EQ(*first, expected);
    ++failures_;
    const Outcome second = outcome_of(function);
    if (!fault_.lasts) {
      EXPECT_EQ(second, std::nullopt);
    }
  }

  void build() {
    store_ = std::make_unique<HostStore>(device_, 1 << 20);
    for (int i = 0; i < 3; ++i) {
      retry(Status::out_of_memory, [&] { images_.push_back(make_image(i)); });
      std::int64_t bytes = 0;
      for (const auto& image : images_) bytes += image->layout().bytes();
      EXPECT_EQ(store_->stats().used_bytes, bytes);
    }
    if (images_.size() < 3) return;
    retry(Status::out_of_memory,
          [&] { arena_ = std::make_shared<Arena>(device_, kLayers, 3 * kLayerBytes, DType::f32); });
    if (arena_ == nullptr) return;
    for (int layer = 0; layer < kLayers; ++layer) {
      std::memset(arena_->layer(layer), static_cast<int>(kPoison), 3 * kLayerBytes);
    }
    retry(Status::out_of_memory, [&] { table_ = std::make_shared<SlotTable>(shape_, arena_, 4); });
    if (table_ == nullptr) return;
    retry(Status::device_failed, [&] { loader_ = std::make_unique<Loader>(table_); });
    if (loader_ == nullptr) return;
    retry(Status::device_failed, [&] { compute_ = device_->make_stream(); });
  }

  std::shared_ptr<const Image> make_image(int i) {
    // The third layer is empty, the last one is in the first image alone.
    const std::int64_t rank = 4 + i;
    const AdapterLayout layout(shape_, DType::f32, {{rank}, {2}, {}, {rank}, {i == 0 ? 1 : 0}});
    return testing::add_image(*store_, layout, std::to_string(i), static_cast<std::uint64_t>(i));
  }

  std::shared_ptr<Ticket> load(int slot) {
    return std::shared_ptr<Ticket>(new Ticket(loader_->load(slot)));
  }

  void load_all() {
    const int a = table_->acquire(images_[0]).slot;
    const int b = table_->acquire(images_[1]).slot;
    const auto first = load(a);
    const auto second = load(a);
    const auto other = load(b);
    auto thread = std::async(std::launch::async, [&] { return wait_for_layers(*other); });
    const Outcome first_outcome = wait_for_all(*first);
    const Outcome second_outcome = wait_for_all(*second);
    ASSERT_EQ(thread.wait_for(kPatience), std::future_status::ready);
    const Outcome other_outcome = thread.get();
    check_end(*first, first_outcome);
    check_end(*second, second_outcome);
    check_end(*other, other_outcome);
    // Two tickets of one load, unless it failed before the second was asked for.
    if (loader_->stats().loads == 2) {
      EXPECT_EQ(first->status(), second->status());
    }
    table_->release(a);
    table_->release(b);

    const int c = table_->acquire(images_[2]).slot;
    const auto third = load(c);
    const Outcome third_outcome =
        fault_.kind == DeviceKind::cuda ? wait_in_stream(*third) : wait_for_all(*third);
    if (fault_.kind == DeviceKind::host) check_end(*third, third_outcome);
    if (third_outcome) {
      EXPECT_EQ(*third_outcome, Status::device_failed);
      ++failures_;
    }
    if (outcome_of([&] { compute_->synchronize(); })) ++failures_;
    table_->release(c);
  }

  static Outcome wait_for_all(Ticket& ticket) {
    return outcome_of([&] { EXPECT_TRUE(ticket.wait_for_all(kPatience)) << "it hangs"; });
  }

  static Outcome wait_for_layers(Ticket& ticket) {
    return outcome_of([&] {
      for (int layer = 0; layer < kLayers; ++layer) {
        EXPECT_TRUE(ticket.wait_for(layer, kPatience)) << "it hangs";
      }
    });
  }

  Outcome wait_in_stream(Ticket& ticket) {
    const Outcome outcome = outcome_of([&] {
      for (int layer = 0; layer < kLayers; ++layer) ticket.wait(layer, *compute_);
    });
    return outcome ? outcome : wait_for_all(ticket);
  }

  void check_end(const Ticket& ticket, const Outcome& outcome) {
    EXPECT_EQ(ticket.status(), outcome ? LoadStatus::failed : LoadStatus::loaded);
    if (outcome) {
      EXPECT_EQ(*outcome, Status::device_failed);
      ++failures_;
      return;
    }
    check_bytes(ticket.slot());
  }

  void check_bytes(int slot) {
    const auto image = table_->image(slot);
    for (int layer = 0; layer < kLayers; ++layer) {
      EXPECT_TRUE(table_->is_published(slot, layer)) << "layer " << layer;
      const auto bytes = static_cast<std::size_t>(image->layout().layer_bytes(layer));
      EXPECT_EQ(std::memcmp(table_->layer_data(slot, layer), image->layer_data(layer), bytes), 0)
          << "adapter " << image->digest() << ", layer " << layer;
    }
  }

  // The loader's own pins go when its copies have ended, which may be after the failure is told.
  void check_nothing_is_pinned() {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    while (table_->stats().pinned > 0) {
      ASSERT_LT(std::chrono::steady_clock::now(), deadline) << "a slot stays pinned";
      std::this_thread::sleep_for(50us);
    }
  }

  void check_stats() const {
    const Loader::Stats stats = loader_->stats();
    // Four, when the first one had ended before its second ticket was asked for.
    EXPECT_TRUE(stats.loads == 3 || stats.loads == 4);
    EXPECT_EQ(stats.cancelled, 0);
    EXPECT_EQ(stats.queued_bytes, 0);
  }

  void load_again() {
    if (fault_.kind == DeviceKind::cuda) compute_ = device_->make_stream();
    for (const auto& image : images_) {
      const int slot = table_->acquire(image).slot;
      const auto ticket = load(slot);
      if (fault_.kind == DeviceKind::cuda) {
        EXPECT_EQ(wait_in_stream(*ticket), std::nullopt);
        compute_->synchronize();
      }
      EXPECT_EQ(wait_for_all(*ticket), std::nullopt);
      check_bytes(slot);
      table_->release(slot);
    }
    check_nothing_is_pinned();
  }

  void tear_down() {
    loader_.reset();
    table_.reset();
    images_.clear();
    for (int i = 0; i < 3; ++i) EXPECT_TRUE(store_->erase(std::to_string(i)));
    EXPECT_EQ(store_->stats().used_bytes, 0);
  }

  const Case fault_;
  std::shared_ptr<FaultyDevice> device_;
  std::shared_ptr<const ModelShape> shape_ =
      std::make_shared<const ModelShape>(std::vector<std::vector<Projection>>{
          {{"p", 16, 16}}, {{"p", 16, 16}}, {}, {{"p", 16, 16}}, {{"p", 16, 16}}});
  std::unique_ptr<HostStore> store_;
  std::vector<std::shared_ptr<const Image>> images_;
  std::shared_ptr<Arena> arena_;
  std::shared_ptr<SlotTable> table_;
  std::unique_ptr<Stream> compute_;
  std::unique_ptr<Loader> loader_;
  bool has_fired_ = false;
  int failures_ = 0;
};

class LoaderFaults : public ::testing::TestWithParam<std::tuple<DeviceKind, Call>> {};

TEST_P(LoaderFaults, EachCallInTurn) {
  const auto [kind, call] = GetParam();
  int fired = 0;
  for (int nth = 1; nth <= 100; ++nth) {
    const Case fault{.call = call, .nth = nth, .kind = kind};
    SCOPED_TRACE(fault.name());
    Scenario scenario(fault);
    scenario.run();
    if (HasFailure()) return;
    if (!scenario.has_fired()) break;
    ++fired;
    // Somebody must have been told; whoever only looked or waited may look again.
    const bool is_told = call != Call::is_done && call != Call::wait_for &&
                         call != Call::synchronize && call != Call::seconds_since;
    if (is_told) {
      EXPECT_GE(scenario.failures(), 1);
    }
  }
  const bool must_occur = call != Call::synchronize && call != Call::wait_for &&
                          (kind == DeviceKind::cuda || call != Call::stream_wait);
  if (must_occur) {
    EXPECT_GE(fired, 1);
  }
}

TEST_P(LoaderFaults, TheDeviceIsGoneForGood) {
  const auto [kind, call] = GetParam();
  for (int nth = 1; nth <= 30; ++nth) {
    const Case fault{.call = call, .nth = nth, .kind = kind, .lasts = true};
    SCOPED_TRACE(fault.name());
    Scenario scenario(fault);
    scenario.run();
    if (HasFailure() || !scenario.has_fired()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(
    , LoaderFaults,
    ::testing::Combine(::testing::Values(DeviceKind::host, DeviceKind::cuda),
                       ::testing::Values(Call::allocate, Call::allocate_host, Call::make_stream,
                                         Call::make_event, Call::copy, Call::lose_copy,
                                         Call::record, Call::stream_wait, Call::synchronize,
                                         Call::is_done, Call::wait_for, Call::seconds_since)),
    [](const auto& test) {
      return std::string(std::get<0>(test.param) == DeviceKind::cuda ? "stream_" : "host_") +
             testing::kCallNames[static_cast<std::size_t>(std::get<1>(test.param))];
    });

}  // namespace
}  // namespace toppings
