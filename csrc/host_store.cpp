// SPDX-License-Identifier: Apache-2.0
#include <toppings/host_store.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <list>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "check.h"
#include "store/host_buffer.h"

namespace toppings {

namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kCancelPeriod(5);

Clock::time_point after(std::chrono::nanoseconds patience) {
  const Clock::time_point now = Clock::now();
  return patience < Clock::time_point::max() - now ? now + patience : Clock::time_point::max();
}

// What the callers of find() and insert() share. When the last of them lets go, the image is idle,
// and whoever waits for room hears of it.
struct Lease {
  Lease(std::shared_ptr<HostBudget> from, std::shared_ptr<const Image> held)
      : budget(std::move(from)), image(std::move(held)) {}
  ~Lease() {
    image.reset();  // may destroy it, so never under the mutex
    budget->give_back(0);
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  std::shared_ptr<HostBudget> budget;
  std::shared_ptr<const Image> image;
};

// A waiting builder. Made and destroyed under the mutex.
struct PlaceInLine {
  explicit PlaceInLine(std::list<std::condition_variable>& of)
      : line(of), self(of.emplace(of.end())) {}
  ~PlaceInLine() {
    line.erase(self);
    if (!line.empty()) line.front().notify_one();
  }
  PlaceInLine(const PlaceInLine&) = delete;
  PlaceInLine& operator=(const PlaceInLine&) = delete;

  std::list<std::condition_variable>& line;
  std::list<std::condition_variable>::iterator self;
};

}  // namespace

class HostStore::Impl {
 public:
  using Images = std::list<std::shared_ptr<const Image>>;

  Impl(std::shared_ptr<Device> device, std::int64_t limit, bool is_shared)
      : budget_(std::make_shared<HostBudget>(std::move(device), limit, is_shared)) {}

  const std::shared_ptr<HostBudget>& budget() const noexcept { return budget_; }

  // Charges `bytes` to the buffer, waiting for room. The evicted images are returned, so that their
  // memory can be given back outside the lock (unmapping pinned memory takes milliseconds); their
  // bytes count for the buffer from now on, so nobody can take the room in between.
  Images charge(HostBuffer& buffer, std::int64_t bytes, std::chrono::nanoseconds patience,
                const std::atomic<bool>* cancel) {
    std::unique_lock lock(budget_->mutex);
    std::optional<Victims> victims;
    if (budget_->waiting.empty()) victims = choose_victims(bytes);
    if (!victims && patience > patience.zero()) {
      victims = wait_for_victims(lock, bytes, after(patience), cancel);
    }
    if (!victims) fail_full(bytes);
    Images evicted;
    std::int64_t inherited = 0;
    for (const auto victim : *victims) {
      index_.erase((*victim)->digest());
      inherited += (*victim)->buffer_->give_up_charge();
      evicted.splice(evicted.end(), images_, victim);
    }
    buffer.set_charge(bytes, inherited);
    evictions_ += static_cast<std::int64_t>(victims->size());
    return evicted;
  }

  std::shared_ptr<const Image> insert(std::shared_ptr<const Image> image) {
    Images node;  // when it isn't taken, it outlives the lock
    node.push_back(std::move(image));
    const Image& made = *node.front();
    const auto lease = std::make_shared<Lease>(budget_, node.front());
    const std::lock_guard lock(budget_->mutex);
    const auto [entry, is_new] = index_.try_emplace(made.digest());
    if (is_new) {
      entry->second = node.begin();
      images_.splice(images_.begin(), node);
      return {lease, &made};
    }
    const std::shared_ptr<const Image>& present = *entry->second;
    if (present->layout() != made.layout()) fail_clash(*present, made);
    images_.splice(images_.begin(), images_, entry->second);
    return lease_of(present);
  }

  std::shared_ptr<const Image> find(const std::string& digest) {
    const std::lock_guard lock(budget_->mutex);
    const auto entry = index_.find(digest);
    if (entry == index_.end()) return nullptr;
    images_.splice(images_.begin(), images_, entry->second);
    return lease_of(images_.front());
  }

  bool erase(const std::string& digest) {
    Images erased;  // outlives the lock
    const std::lock_guard lock(budget_->mutex);
    const auto entry = index_.find(digest);
    if (entry == index_.end()) return false;
    erased.splice(erased.end(), images_, entry->second);
    index_.erase(entry);
    return true;
  }

  Stats stats() const {
    const std::lock_guard lock(budget_->mutex);
    return {.budget_bytes = budget_->limit,
            .used_bytes = budget_->used,
            .images = static_cast<std::int64_t>(images_.size()),
            .evictions = evictions_,
            .waiting = static_cast<std::int64_t>(budget_->waiting.size())};
  }

 private:
  using Victims = std::vector<Images::iterator>;

  // Idle images to evict for `bytes` more, least recently used first, none of which could stay;
  // nothing when all of them would not do.
  std::optional<Victims> choose_victims(std::int64_t bytes) {
    const std::int64_t excess = bytes - (budget_->limit - budget_->used);
    Victims victims;
    std::int64_t freed = 0;
    for (auto image = images_.end(); freed < excess && image != images_.begin();) {
      --image;
      if (!is_idle(*image)) continue;
      victims.push_back(image);
      freed += (*image)->buffer_->charge();
    }
    if (freed < excess) return std::nullopt;
    // A large image chosen late can make small ones before it superfluous; spare the most recently
    // used of them.
    for (auto victim = victims.rbegin(); victim != victims.rend(); ++victim) {
      const std::int64_t charge = (**victim)->buffer_->charge();
      if (freed - charge < excess) continue;
      freed -= charge;
      *victim = images_.end();
    }
    std::erase(victims, images_.end());
    return victims;
  }

  // Only the first in the line looks for room, whenever something was given back; the next one is
  // woken when it leaves.
  std::optional<Victims> wait_for_victims(std::unique_lock<std::mutex>& lock, std::int64_t bytes,
                                          Clock::time_point deadline,
                                          const std::atomic<bool>* cancel) {
    const PlaceInLine place(budget_->waiting);
    for (;;) {
      const Clock::time_point next = cancel == nullptr ? deadline : Clock::now() + kCancelPeriod;
      place.self->wait_until(lock, std::min(next, deadline));
      if (cancel != nullptr && *cancel) {
        fail(Status::cancelled, "host store", std::to_string(bytes) + " bytes", "a cancellation");
      }
      std::optional<Victims> victims;
      if (place.self == place.line.begin()) victims = choose_victims(bytes);
      if (victims || Clock::now() >= deadline) return victims;
    }
  }

  [[noreturn]] void fail_full(std::int64_t bytes) const {
    std::int64_t room = budget_->limit - budget_->used;
    for (const std::shared_ptr<const Image>& image : images_) {
      if (is_idle(image)) room += image->buffer_->charge();
    }
    const char* const line = room < bytes ? "" : ", for which others have waited longer";
    fail(Status::store_full, "host store", std::to_string(bytes) + " free or idle bytes",
         std::to_string(room) + " of " + std::to_string(budget_->limit) + line);
  }

  [[noreturn]] static void fail_clash(const Image& present, const Image& made) {
    const auto text = [](const AdapterLayout& layout) {
      return std::to_string(layout.bytes()) + " bytes of " + std::string(name_of(layout.dtype()));
    };
    fail(Status::invalid_argument, "image " + made.digest(),
         "the layout of the image of this digest in the store (" + text(present.layout()) + ")",
         text(made.layout()));
  }

  // Only the list holds it. New leases are made under the mutex, and from the list alone, so a
  // count of 1 can't rise while it is held.
  static bool is_idle(const std::shared_ptr<const Image>& image) { return image.use_count() == 1; }

  std::shared_ptr<const Image> lease_of(const std::shared_ptr<const Image>& image) const {
    const Image* const data = image.get();
    return {std::make_shared<Lease>(budget_, image), data};
  }

  const std::shared_ptr<HostBudget> budget_;  // its mutex guards what follows
  Images images_;                             // most recently used first
  std::unordered_map<std::string, Images::iterator> index_;
  std::int64_t evictions_ = 0;
};

HostStore::HostStore(std::shared_ptr<Device> device, std::int64_t budget_bytes, bool is_shared) {
  if (device == nullptr) fail(Status::invalid_argument, "device", "a device", "null");
  check_positive("budget_bytes", budget_bytes);
  impl_ = std::make_unique<Impl>(std::move(device), budget_bytes, is_shared);
}

HostStore::~HostStore() = default;

ImageBuilder HostStore::build(AdapterLayout layout, std::string digest,
                              std::chrono::nanoseconds patience, const std::atomic<bool>* cancel) {
  if (digest.empty()) fail(Status::invalid_argument, "digest", "a non-empty string", "''");
  const std::int64_t limit = impl_->budget()->limit;
  if (layout.bytes() > limit) {
    fail(Status::invalid_argument, "image",
         "at most the store's budget of " + std::to_string(limit) + " bytes",
         std::to_string(layout.bytes()));
  }
  auto buffer = std::make_unique<HostBuffer>(impl_->budget());
  // What it evicts is freed before the next line.
  impl_->charge(*buffer, layout.bytes(), patience, cancel);
  buffer->allocate();
  return ImageBuilder(std::move(digest), std::move(layout), std::move(buffer));
}

std::shared_ptr<const Image> HostStore::insert(ImageBuilder&& builder) {
  if (builder.buffer_ != nullptr && builder.buffer_->budget() != impl_->budget().get()) {
    fail(Status::invalid_argument, "builder", "one of this store", "one of another");
  }
  return impl_->insert(std::move(builder).finish());
}

std::shared_ptr<const Image> HostStore::find(const std::string& digest) {
  return impl_->find(digest);
}

bool HostStore::erase(const std::string& digest) { return impl_->erase(digest); }

const std::shared_ptr<Device>& HostStore::device() const noexcept {
  return impl_->budget()->device;
}

std::span<const std::byte> HostStore::region() const noexcept {
  const std::unique_ptr<HostRegion>& region = impl_->budget()->region;
  return region == nullptr ? std::span<const std::byte>() : region->addresses();
}

int HostStore::region_file() const noexcept {
  const std::unique_ptr<HostRegion>& region = impl_->budget()->region;
  return region == nullptr ? -1 : region->file();
}

HostStore::Stats HostStore::stats() const { return impl_->stats(); }

}  // namespace toppings
