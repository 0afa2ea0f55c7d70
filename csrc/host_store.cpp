// SPDX-License-Identifier: Apache-2.0
#include <toppings/host_store.h>

#include <list>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "check.h"
#include "host_buffer.h"

namespace toppings {

class HostStore::Impl {
 public:
  using Images = std::list<std::shared_ptr<const Image>>;

  Impl(std::shared_ptr<Device> device, std::int64_t limit)
      : budget_(std::make_shared<HostBudget>(std::move(device), limit)) {}

  const std::shared_ptr<HostBudget>& budget() const noexcept { return budget_; }

  // Charges `bytes` to the buffer. The evicted images are returned, so that their memory can be
  // given back outside the lock (unmapping pinned memory takes milliseconds); their bytes count for
  // the buffer from now on, so nobody can take the room in between.
  Images charge(HostBuffer& buffer, std::int64_t bytes) {
    std::lock_guard lock(mutex_);
    const std::int64_t excess = bytes - (budget_->limit - budget_->used);
    const std::vector<Images::iterator> victims = choose_victims(excess, bytes);
    Images evicted;
    std::int64_t inherited = 0;
    for (const auto victim : victims) {
      index_.erase((*victim)->digest());
      inherited += (*victim)->buffer_->give_up_charge();
      evicted.splice(evicted.end(), images_, victim);
    }
    buffer.set_charge(bytes, inherited);
    evictions_ += static_cast<std::int64_t>(victims.size());
    return evicted;
  }

  std::shared_ptr<const Image> insert(std::shared_ptr<const Image> image) {
    Images node;
    node.push_back(std::move(image));
    std::lock_guard lock(mutex_);
    const auto [entry, is_new] = index_.try_emplace(node.front()->digest());
    if (is_new) {
      entry->second = node.begin();
      images_.splice(images_.begin(), node);
    } else {
      images_.splice(images_.begin(), images_, entry->second);
    }
    return images_.front();
  }

  std::shared_ptr<const Image> find(const std::string& digest) {
    std::lock_guard lock(mutex_);
    const auto entry = index_.find(digest);
    if (entry == index_.end()) return nullptr;
    images_.splice(images_.begin(), images_, entry->second);
    return images_.front();
  }

  bool erase(const std::string& digest) {
    Images erased;  // outlives the lock
    std::lock_guard lock(mutex_);
    const auto entry = index_.find(digest);
    if (entry == index_.end()) return false;
    erased.splice(erased.end(), images_, entry->second);
    index_.erase(entry);
    return true;
  }

  Stats stats() const {
    std::lock_guard lock(mutex_);
    return {.budget_bytes = budget_->limit,
            .used_bytes = budget_->used,
            .images = static_cast<std::int64_t>(images_.size()),
            .evictions = evictions_};
  }

 private:
  // Idle images of at least `excess` bytes together, least recently used first, none of which could
  // stay. Throws store_full.
  std::vector<Images::iterator> choose_victims(std::int64_t excess, std::int64_t bytes) {
    std::vector<Images::iterator> victims;
    std::int64_t freed = 0;
    for (auto image = images_.end(); freed < excess && image != images_.begin();) {
      --image;
      // Idle: only the list holds it. New references are made under the lock or from an existing
      // one, so a count of 1 can't rise while the lock is held.
      if (image->use_count() != 1) continue;
      victims.push_back(image);
      freed += (*image)->buffer_->charge();
    }
    if (freed < excess) {
      fail(Status::store_full, "host store", std::to_string(bytes) + " free or idle bytes",
           std::to_string(bytes - excess + freed) + " of " + std::to_string(budget_->limit));
    }
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

  const std::shared_ptr<HostBudget> budget_;
  mutable std::mutex mutex_;
  Images images_;  // most recently used first
  std::unordered_map<std::string, Images::iterator> index_;
  std::int64_t evictions_ = 0;
};

HostStore::HostStore(std::shared_ptr<Device> device, std::int64_t budget_bytes) {
  if (device == nullptr) fail(Status::invalid_argument, "device", "a device", "null");
  check_positive("budget_bytes", budget_bytes);
  impl_ = std::make_unique<Impl>(std::move(device), budget_bytes);
}

HostStore::~HostStore() = default;

ImageBuilder HostStore::build(AdapterLayout layout, std::string digest) {
  if (digest.empty()) fail(Status::invalid_argument, "digest", "a non-empty string", "''");
  const std::int64_t limit = impl_->budget()->limit;
  if (layout.bytes() > limit) {
    fail(Status::invalid_argument, "image",
         "at most the store's budget of " + std::to_string(limit) + " bytes",
         std::to_string(layout.bytes()));
  }
  auto buffer = std::make_unique<HostBuffer>(impl_->budget());
  impl_->charge(*buffer, layout.bytes());  // what it evicts is freed before the next line
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

HostStore::Stats HostStore::stats() const { return impl_->stats(); }

}  // namespace toppings
