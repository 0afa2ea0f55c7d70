// SPDX-License-Identifier: Apache-2.0
// Threads that load, wait, cancel, raise, release and evict at random, for `--seconds=N` (1) in
// each test. Every layer that is waited for is compared with the bytes that its adapter was made
// of.
#include <toppings/image_reader.h>
#include <toppings/loader.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <optional>
#include <string_view>
#include <thread>

#include "faults.h"
#include "image_file_testing.h"
#include "testing.h"

namespace toppings {
namespace {

using testing::Call;
using testing::FaultyDevice;
using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

double seconds_per_test = 1;

constexpr int kAdapters = 24;
constexpr auto kPatience = 60s;  // for what takes milliseconds
constexpr std::byte kPoison{0xA5};

// What all threads share: adapters, a store with too little room for all of them, a table with too
// little room for those in the store.
class World {
 public:
  World(std::shared_ptr<Device> device, bool is_in_place) : device_(std::move(device)) {
    std::mt19937_64 random(7);
    HostStore reference(host_device(), std::int64_t{1} << 26);
    std::int64_t all_bytes = 0;
    std::int64_t largest_layer = 0;
    for (int i = 0; i < kAdapters; ++i) {
      layouts_.emplace_back(shape_, DType::f16, random_ranks(random));
      images_.push_back(
          testing::add_image(reference, layouts_.back(), digest(i), seed(i)));  // never touched
      all_bytes += layouts_.back().bytes();
      largest_layer = std::max(largest_layer, layouts_.back().max_layer_bytes());
    }
    store_ = std::make_shared<HostStore>(device_, all_bytes / 2);
    for (int i = 0; i < kAdapters; ++i)
      write_image(*images_[static_cast<std::size_t>(i)], file_of(i));
    testing::Bytes damaged = testing::bytes_of(file_of(0));
    damaged.back() = static_cast<char>(damaged.back() ^ 1);
    damaged[damaged.size() / 2] = static_cast<char>(damaged[damaged.size() / 2] ^ 1);
    testing::write_bytes(file_of(kAdapters), damaged);
    reader_ = std::make_unique<ImageReader>(store_, 2);
    arena_ = is_in_place ? Arena::in_place(store_, shape_->num_layers(), DType::f16)
                         : std::make_shared<Arena>(device_, shape_->num_layers(), 3 * largest_layer,
                                                   DType::f16);
    for (int layer = 0; layer < shape_->num_layers() && !is_in_place; ++layer) {
      std::memset(arena_->layer(layer), static_cast<int>(kPoison),
                  static_cast<std::size_t>(arena_->bytes_per_layer()));
    }
    table_ = std::make_shared<SlotTable>(shape_, arena_, 7);
    loader_ = std::make_unique<Loader>(table_, LoaderOptions{.num_streams = 3});
  }

  static std::string digest(int i) { return "adapter " + std::to_string(i); }
  static std::uint64_t seed(int i) { return static_cast<std::uint64_t>(100 + i); }

  std::string file_of(int i) const { return folder_ / std::to_string(i); }

  const ModelShape& shape() const { return *shape_; }
  ImageReader& reader() { return *reader_; }
  HostStore& store() { return *store_; }
  SlotTable& table() { return *table_; }
  Loader& loader() { return *loader_; }
  Device& device() { return *device_; }
  const Image& reference(int i) const { return *images_[static_cast<std::size_t>(i)]; }

  // From the store, or built; null when the store is too full.
  std::shared_ptr<const Image> get(int i, std::chrono::nanoseconds patience) {
    if (auto image = store_->find(digest(i))) return image;
    try {
      ImageBuilder builder =
          store_->build(layouts_[static_cast<std::size_t>(i)], digest(i), patience);
      testing::fill(builder, seed(i));
      return store_->insert(std::move(builder));
    } catch (const Error& error) {
      if (error.status() != Status::store_full) fail(error.what());
      return nullptr;
    }
  }

  // Compares a published layer with the adapter, through the rows that the operators read.
  void check_layer(int i, int slot, int layer) {
    check_rows(i, slot, layer, table_->slots().data(), arena_->layer(layer));
  }

  // rows: the table, or a copy of it; bytes: the layer's arena, or a copy of it.
  void check_rows(int i, int slot, int layer, const std::int64_t* rows, const std::byte* bytes) {
    const Image& image = reference(i);
    for (int p = 0; p < static_cast<int>(shape_->layer(layer).size()); ++p) {
      const Block& block = image.layout().block(layer, p);
      const std::int64_t* cell =
          rows +
          3 * (static_cast<std::ptrdiff_t>(shape_->row(layer, p)) * table_->num_slots() + slot);
      const Projection& projection = shape_->layer(layer)[static_cast<std::size_t>(p)];
      const auto length =
          static_cast<std::size_t>(2 * block.rank * (projection.in + projection.out));
      const bool is_right =
          cell[2] == block.rank &&
          (block.rank == 0 ||
           (cell[1] - cell[0] == block.b_offset - block.a_offset &&
            std::memcmp(bytes + 2 * cell[0], image.layer_data(layer) + 2 * block.a_offset,
                        length) == 0));
      if (!is_right) {
        fail("adapter " + std::to_string(i) + ", layer " + std::to_string(layer) + ", projection " +
             std::to_string(p) + ": rank " + std::to_string(cell[2]) + " instead of " +
             std::to_string(block.rank) + ", or other bytes");
      }
    }
    ++layers_checked_;
  }

  void check_image(int i, const Image& image) {
    const bool is_right = std::memcmp(image.layer_data(0), reference(i).layer_data(0),
                                      static_cast<std::size_t>(image.layout().bytes())) == 0;
    if (!is_right) fail("image " + std::to_string(i) + " has other bytes");
    ++images_checked_;
  }

  // Only the first few are told.
  void fail(const std::string& what) {
    if (failures_.fetch_add(1) < 10) ADD_FAILURE() << what;
    stop_ = true;
  }

  bool is_over() const { return stop_ || Clock::now() >= end_; }
  int layers_checked() const { return layers_checked_; }
  int images_checked() const { return images_checked_; }

  void run(const std::vector<std::function<void(std::mt19937_64&)>>& roles) {
    std::vector<std::thread> threads;
    std::uint64_t next_seed = 1;
    for (const auto& role : roles) {
      threads.emplace_back([this, &role, seed = next_seed++] {
        std::mt19937_64 random(seed);
        while (!is_over()) {
          try {
            role(random);
          } catch (const std::exception& error) {
            fail(error.what());
          }
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  // Nobody uses anything any more.
  void check_end() {
    const auto deadline = Clock::now() + kPatience;
    while (table_->stats().pinned > 0 && Clock::now() < deadline) {
      std::this_thread::sleep_for(1ms);
    }
    EXPECT_EQ(table_->stats().pinned, 0);
    const Loader::Stats stats = loader_->stats();
    EXPECT_EQ(stats.queued_bytes, 0);
    EXPECT_EQ(stats.failed, 0);
    EXPECT_LE(stats.cancelled, stats.loads);
    loader_.reset();
    table_.reset();
    reader_.reset();
    for (int i = 0; i < kAdapters; ++i) store_->erase(digest(i));
    EXPECT_EQ(store_->stats().images, 0);
    EXPECT_EQ(store_->stats().used_bytes, 0);
    EXPECT_EQ(store_->stats().waiting, 0);
  }

 private:
  testing::Ranks random_ranks(std::mt19937_64& random) const {
    // Ranks from 1 to 24 in most projections, so that sizes differ by much.
    const auto scale = static_cast<std::int64_t>(1 + random() % 24);
    testing::Ranks ranks;
    for (int layer = 0; layer < shape_->num_layers(); ++layer) {
      std::vector<std::int64_t>& row = ranks.emplace_back();
      for (std::size_t p = 0; p < shape_->layer(layer).size(); ++p) {
        row.push_back(random() % 5 == 0 ? 0 : scale);
      }
    }
    ranks[0][0] = scale;
    return ranks;
  }

  testing::TemporaryFolder folder_;  // of packed images; the last one is damaged
  std::shared_ptr<Device> device_;
  std::shared_ptr<const ModelShape> shape_ = std::make_shared<const ModelShape>(
      std::vector<std::vector<Projection>>{{{"q", 64, 96}, {"k", 64, 16}},
                                           {},
                                           {{"o", 96, 64}},
                                           {{"up", 64, 200}, {"gate", 64, 200}},
                                           {{"down", 200, 64}},
                                           {{"q", 64, 96}}});
  std::vector<AdapterLayout> layouts_;
  std::vector<std::shared_ptr<const Image>> images_;
  std::shared_ptr<HostStore> store_;
  std::unique_ptr<ImageReader> reader_;
  std::shared_ptr<Arena> arena_;
  std::shared_ptr<SlotTable> table_;
  std::unique_ptr<Loader> loader_;
  std::atomic<int> layers_checked_ = 0;
  std::atomic<int> images_checked_ = 0;
  std::atomic<int> failures_ = 0;
  std::atomic<bool> stop_ = false;
  const Clock::time_point end_ =
      Clock::now() + std::chrono::nanoseconds(std::llround(seconds_per_test * 1e9));
};

// Tickets that other threads may cancel or raise meanwhile.
class OpenTickets {
 public:
  void add(std::shared_ptr<Ticket> ticket) {
    const std::lock_guard lock(mutex_);
    if (tickets_.size() >= 8) tickets_.erase(tickets_.begin());
    tickets_.push_back(std::move(ticket));
  }
  std::shared_ptr<Ticket> any(std::mt19937_64& random) {
    const std::lock_guard lock(mutex_);
    return tickets_.empty() ? nullptr : tickets_[random() % tickets_.size()];
  }
  void clear() { tickets_.clear(); }

 private:
  std::mutex mutex_;
  std::vector<std::shared_ptr<Ticket>> tickets_;
};

int any_adapter(std::mt19937_64& random) {
  // Some are wanted much more often than others, so that loads of one slot meet.
  return static_cast<int>(random() % 2 == 0 ? random() % 4 : random() % kAdapters);
}

LoadPriority any_priority(std::mt19937_64& random) {
  return static_cast<LoadPriority>(random() % 3);
}

std::vector<int> any_order(std::mt19937_64& random, int num_layers) {
  if (random() % 2 == 0) return {};
  std::vector<int> order(static_cast<std::size_t>(num_layers));
  for (int layer = 0; layer < num_layers; ++layer) order[static_cast<std::size_t>(layer)] = layer;
  std::ranges::shuffle(order, random);
  return order;
}

// A pinned slot of an adapter, or nothing when the store or the table is too full.
std::optional<SlotTable::Acquired> acquire(World& world, int i, std::mt19937_64& random) {
  const auto image = world.get(i, random() % 4 == 0 ? 2ms : 0ms);
  if (image == nullptr) return std::nullopt;
  try {
    return world.table().acquire(image);
  } catch (const Error& error) {
    if (error.status() != Status::slots_busy) world.fail(error.what());
    std::this_thread::yield();
    return std::nullopt;
  }
}

std::shared_ptr<Ticket> begin_load(World& world, int slot, std::mt19937_64& random) {
  return std::shared_ptr<Ticket>(new Ticket(world.loader().load(
      slot, any_priority(random), any_order(random, world.shape().num_layers()))));
}

// Runs a wait; false when the ticket was cancelled.
template <class Wait>
bool wait(World& world, Wait wait) {
  try {
    if (!wait()) world.fail("a layer didn't arrive in time");
    return true;
  } catch (const Error& error) {
    if (error.status() != Status::cancelled) world.fail(error.what());
    return false;
  }
}

void request_on_host(World& world, OpenTickets& tickets, std::mt19937_64& random) {
  const int i = any_adapter(random);
  const auto acquired = acquire(world, i, random);
  if (!acquired) return;
  const int slot = acquired->slot;
  if (acquired->resident && random() % 4 != 0) {
    for (int layer = 0; layer < world.shape().num_layers(); ++layer) {
      world.check_layer(i, slot, layer);
    }
    world.table().release(slot);
    return;
  }
  const auto ticket = begin_load(world, slot, random);
  if (random() % 2 == 0) tickets.add(ticket);
  const auto dice = random() % 8;
  if (dice == 0) {  // gone at once
    world.table().release(slot);
    return;
  }
  if (dice == 1) ticket->cancel();
  if (dice == 2) wait(world, [&] { return ticket->wait_for_all(kPatience); });
  for (const int layer : {0, 3, 1, 5, 2, 4}) {
    if (random() % 4 == 0) continue;
    if (!wait(world, [&] { return ticket->wait_for(layer, kPatience); })) break;
    world.check_layer(i, slot, layer);
    if (!ticket->has_arrived(layer) || !world.table().is_published(slot, layer)) {
      world.fail("a layer that has arrived isn't there");
    }
  }
  world.table().release(slot);
}

// The same in stream order. What a kernel would read is copied in the stream, and compared later.
void request_in_stream(World& world, OpenTickets& tickets, Stream& stream,
                       std::mt19937_64& random) {
  const int i = any_adapter(random);
  const auto acquired = acquire(world, i, random);
  if (!acquired) return;
  const int slot = acquired->slot;
  const auto ticket = begin_load(world, slot, random);
  if (random() % 2 == 0) tickets.add(ticket);
  const std::size_t cells = world.table().slots().size();
  const auto arena_bytes = static_cast<std::size_t>(world.table().arena()->bytes_per_layer());
  struct Seen {
    int layer;
    std::vector<std::int64_t> rows;
    std::vector<std::byte> bytes;
  };
  std::vector<Seen> seen;
  for (int layer = 0; layer < world.shape().num_layers(); ++layer) {
    if (random() % 4 == 0) continue;
    const bool is_there = wait(world, [&] {
      ticket->wait(layer, stream);
      return true;
    });
    if (!is_there) break;
    Seen& last = seen.emplace_back(layer, std::vector<std::int64_t>(cells),
                                   std::vector<std::byte>(arena_bytes));
    // Its own rows and bytes alone: the others belong to other requests, and may change.
    for (int p = 0; p < static_cast<int>(world.shape().layer(layer).size()); ++p) {
      const std::size_t cell = 3 * (static_cast<std::size_t>(world.shape().row(layer, p)) *
                                        static_cast<std::size_t>(world.table().num_slots()) +
                                    static_cast<std::size_t>(slot));
      stream.copy(&last.rows[cell], world.table().device_slots() + cell, 3 * sizeof(std::int64_t));
    }
    const std::byte* from = world.table().layer_data(slot, layer);
    const auto length = static_cast<std::size_t>(world.reference(i).layout().layer_bytes(layer));
    if (length > 0) {
      stream.copy(last.bytes.data() + (from - world.table().arena()->layer(layer)), from, length);
    }
  }
  const auto event = world.device().make_event();
  stream.record(*event);
  if (!event->wait_for(kPatience)) world.fail("the stream doesn't go on");
  for (const Seen& layer : seen) {
    world.check_rows(i, slot, layer.layer, layer.rows.data(), layer.bytes.data());
  }
  world.table().release(slot);
}

// Nothing is copied: the rows point into the store.
void request_in_place(World& world, std::mt19937_64& random) {
  const int i = any_adapter(random);
  const auto acquired = acquire(world, i, random);
  if (!acquired) return;
  if (!acquired->resident) world.fail("in place, but not resident");
  if (random() % 4 == 0 &&
      begin_load(world, acquired->slot, random)->status() != LoadStatus::loaded) {
    world.fail("in place, but not loaded");
  }
  for (int layer = 0; layer < world.shape().num_layers(); ++layer) {
    world.check_layer(i, acquired->slot, layer);
  }
  world.table().release(acquired->slot);
}

void meddle(OpenTickets& tickets, std::mt19937_64& random) {
  const auto ticket = tickets.any(random);
  if (ticket != nullptr) {
    if (random() % 3 == 0) {
      ticket->cancel();
    } else {
      ticket->raise(any_priority(random));
    }
    const double seconds = ticket->seconds_until(static_cast<int>(random() % 6));
    if (!(seconds >= 0)) ADD_FAILURE() << seconds << " seconds until a layer arrives";
    static_cast<void>(ticket->times());
  }
  std::this_thread::sleep_for(100us);
}

void use_store(World& world, std::mt19937_64& random) {
  const int i = static_cast<int>(random() % kAdapters);
  if (random() % 8 == 0) world.store().erase(World::digest(i));
  const auto image = world.get(i, random() % 2 == 0 ? 5ms : 0ms);
  if (image != nullptr) world.check_image(i, *image);
  if (random() % 4 == 0) {  // a builder that is given up
    try {
      const auto builder = world.store().build(world.reference(i).layout(), "never", 1ms);
    } catch (const Error& error) {
      if (error.status() != Status::store_full) world.fail(error.what());
    }
  }
}

// From files, one of which is damaged: the damage has the digest of an adapter that may be there.
void read_file(World& world, std::mt19937_64& random) {
  const int i = static_cast<int>(random() % (kAdapters + 1));
  if (random() % 2 == 0) world.store().erase(World::digest(i % kAdapters));
  const auto ticket = world.reader().read(world.file_of(i), nullptr, 2ms);
  if (random() % 4 == 0) ticket->cancel();
  if (random() % 8 == 0) return;  // dropped
  try {
    const auto image = ticket->wait_for(kPatience);
    if (image == nullptr) return world.fail("a read doesn't end");
    world.check_image(i % kAdapters, *image);
  } catch (const Error& error) {
    const bool is_expected = error.status() == Status::cancelled ||
                             error.status() == Status::store_full ||
                             (error.status() == Status::format && i == kAdapters);
    if (!is_expected) world.fail(error.what());
  }
}

void look(World& world, Stream* stream) {
  const SlotTable::Stats slots = world.table().stats();
  const HostStore::Stats store = world.store().stats();
  const Loader::Stats loads = world.loader().stats();
  if (slots.used_bytes > slots.arena_bytes || slots.pinned > slots.slots ||
      slots.resident > slots.slots || store.used_bytes > store.budget_bytes ||
      store.used_bytes < 0 || loads.cancelled > loads.loads || loads.queued_bytes < 0) {
    world.fail("the figures contradict themselves");
  }
  if (stream != nullptr) world.table().upload(*stream);
  std::this_thread::sleep_for(200us);
}

using Roles = std::vector<std::function<void(std::mt19937_64&)>>;

std::shared_ptr<Device> fast_link() { return host_device(HostLink{2e9, 3e-6}); }

TEST(Stress, OnTheHost) {
  const auto device = std::make_shared<FaultyDevice>(fast_link());  // counts copies
  World world(device, false);
  OpenTickets tickets;
  const auto request = [&](auto& random) { request_on_host(world, tickets, random); };
  world.run(
      Roles{request, request, request, request, [&](auto& random) { meddle(tickets, random); },
            [&](auto& random) { use_store(world, random); },
            [&](auto& random) { read_file(world, random); }, [&](auto&) { look(world, nullptr); }});
  const auto deadline = Clock::now() + kPatience;
  while (world.table().stats().pinned > 0 && Clock::now() < deadline) {
    std::this_thread::sleep_for(1ms);
  }
  const Loader::Stats stats = world.loader().stats();
  EXPECT_EQ(stats.layers, device->plan().count(Call::copy));
  EXPECT_GT(world.layers_checked(), 50);
  EXPECT_GT(world.images_checked(), 10);
  EXPECT_GT(stats.cancelled, 0);
  EXPECT_GT(world.table().stats().evictions, 10);
  EXPECT_GT(world.store().stats().evictions, 10);
  tickets.clear();
  world.check_end();
}

TEST(Stress, InStreamOrder) {
  const auto device = std::make_shared<FaultyDevice>(fast_link(), DeviceKind::cuda);
  World world(device, false);
  OpenTickets tickets;
  const auto stream = device->make_stream();  // the only one that computes
  const auto request = [&](auto& random) { request_in_stream(world, tickets, *stream, random); };
  world.run(Roles{request, request, request, [&](auto& random) { meddle(tickets, random); },
                  [&](auto& random) { use_store(world, random); },
                  [&](auto&) { look(world, stream.get()); }});
  stream->synchronize();
  EXPECT_GT(world.layers_checked(), 50);
  EXPECT_GT(world.loader().stats().cancelled, 0);
  EXPECT_GT(world.table().stats().evictions, 10);
  tickets.clear();
  world.check_end();
}

TEST(Stress, InPlace) {
  World world(host_device(), true);
  const auto request = [&](auto& random) { request_in_place(world, random); };
  world.run(Roles{request, request, request, [&](auto& random) { use_store(world, random); },
                  [&](auto& random) { read_file(world, random); },
                  [&](auto&) { look(world, nullptr); }});
  EXPECT_GT(world.layers_checked(), 50);
  EXPECT_EQ(world.loader().stats().layers, 0);
  EXPECT_GT(world.store().stats().evictions, 10);
  world.check_end();
}

}  // namespace
}  // namespace toppings

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  constexpr std::string_view kSeconds = "--seconds=";
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    char* end = nullptr;
    if (argument.starts_with(kSeconds)) {
      toppings::seconds_per_test = std::strtod(argv[i] + kSeconds.size(), &end);
    }
    if (end == nullptr || *end != 0 || !(toppings::seconds_per_test > 0)) {
      std::fprintf(stderr, "argument: expected --seconds=N, got %s\n", argv[i]);
      return 2;
    }
  }
  return RUN_ALL_TESTS();
}
