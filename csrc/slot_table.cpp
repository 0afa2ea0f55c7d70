// SPDX-License-Identifier: Apache-2.0
#include <toppings/slot_table.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "check.h"
#include "range_allocator.h"
#include "slots/eviction.h"
#include "slots/lora_tables.h"

namespace toppings {

static_assert(RangeAllocator::kGranule % kBlockAlignment == 0);

class SlotTable::Impl {
 public:
  Impl(std::shared_ptr<const ModelShape> shape, std::shared_ptr<Arena> arena, int num_slots)
      : shape_(std::move(shape)),
        arena_(std::move(arena)),
        ranges_(arena_->bytes_per_layer(), num_slots),
        slots_(static_cast<std::size_t>(num_slots)),
        tables_(arena_->device(), *shape_, num_slots) {}

  const std::shared_ptr<Arena>& arena() const noexcept { return arena_; }
  const LoraTables& tables() const noexcept { return tables_; }
  int num_slots() const noexcept { return static_cast<int>(slots_.size()); }

  Acquired acquire(std::shared_ptr<const Image> image) {
    std::lock_guard lock(mutex_);
    check_fits(*image);
    const int found = find_locked(image->digest());
    if (found >= 0 && fits(found, *image)) {
      Slot& entry = slots_[static_cast<std::size_t>(found)];
      ++entry.pins;
      entry.last_use = ++clock_;
      if (entry.pins == 1) entry.image = std::move(image);  // it was idle
      return {.slot = found, .resident = entry.missing == 0};
    }
    if (found >= 0 && slots_[static_cast<std::size_t>(found)].pins > 0) {
      fail(Status::invalid_argument, "image " + image->digest(),
           "the layout that this digest has in slot " + std::to_string(found), "another one");
    }
    const std::int64_t need = range_bytes(*image);
    const std::optional<std::vector<int>> victims = choose_victims(need);
    if (!victims) {
      fail(Status::slots_busy, "slot table",
           "a free or idle slot and " + std::to_string(need) + " adjacent free or idle bytes",
           busy_state());
    }
    // Everything that can run out of memory comes first, so that a failure changes nothing.
    std::string digest = image->digest();
    std::vector<bool> published(static_cast<std::size_t>(shape_->num_layers()));
    AdapterLayout layout = image->layout();
    if (found >= 0) evict(found);  // idle, and another adapter in truth
    const auto entry = by_digest_.try_emplace(digest, kNone).first;
    for (const int victim : *victims) {
      if (victim != found) evict(victim);
    }
    const int slot = free_index();
    entry->second = slot;
    slots_[static_cast<std::size_t>(slot)] = {
        .digest = std::move(digest),
        .layout = std::move(layout),
        .image = std::move(image),
        .offset = need > 0 ? *ranges_.allocate(need, slot) : 0,
        .pins = 1,
        .last_use = ++clock_,
        .missing = shape_->num_layers(),
        .published = std::move(published)};
    if (!arena_->is_in_place()) return {.slot = slot, .resident = false};
    for (int layer = 0; layer < shape_->num_layers(); ++layer) publish_locked(slot, layer);
    return {.slot = slot, .resident = true};
  }

  bool can_acquire(const Image& image) const {
    std::lock_guard lock(mutex_);
    check_fits(image);
    const int found = find_locked(image.digest());
    if (found >= 0 && fits(found, image)) return true;
    if (found >= 0 && slots_[static_cast<std::size_t>(found)].pins > 0) return false;
    return choose_victims(range_bytes(image)).has_value();
  }

  void release(int slot) {
    std::shared_ptr<const Image> image;  // let go after the lock
    std::lock_guard lock(mutex_);
    Slot& entry = pinned(slot);
    --entry.pins;
    entry.last_use = ++clock_;
    if (entry.pins > 0) return;
    image = std::move(entry.image);
    if (arena_->is_in_place()) evict(slot);
  }

  int find(const std::string& digest) const {
    std::lock_guard lock(mutex_);
    return find_locked(digest);
  }

  void publish(int slot, int layer) {
    std::lock_guard lock(mutex_);
    check_index("layer", layer, shape_->num_layers());
    pinned(slot);
    publish_locked(slot, layer);
  }

  void unpublish(int slot, int layer) {
    std::lock_guard lock(mutex_);
    check_index("layer", layer, shape_->num_layers());
    Slot& entry = pinned(slot);
    const auto l = static_cast<std::size_t>(layer);
    if (!entry.published[l]) return;
    tables_.clear(layer, slot);
    entry.published[l] = false;
    ++entry.missing;
  }

  bool is_published(int slot, int layer) const {
    std::lock_guard lock(mutex_);
    check_index("slot", slot, num_slots());
    check_index("layer", layer, shape_->num_layers());
    const Slot& entry = slots_[static_cast<std::size_t>(slot)];
    return !entry.is_free() && entry.published[static_cast<std::size_t>(layer)];
  }

  std::byte* layer_data(int slot, int layer) {
    std::lock_guard lock(mutex_);
    check_index("layer", layer, shape_->num_layers());
    return place_of(pinned(slot), layer);
  }

  std::shared_ptr<const Image> image(int slot) {
    std::lock_guard lock(mutex_);
    return pinned(slot).image;
  }

  void upload(Stream& stream, int first, int last) {
    std::lock_guard lock(mutex_);
    tables_.upload(stream, first, last);
  }

  int num_layers() const noexcept { return shape_->num_layers(); }

  Stats stats() const {
    std::lock_guard lock(mutex_);
    Stats stats{.slots = num_slots(),
                .resident = static_cast<int>(by_digest_.size()),
                .pinned = 0,
                .arena_bytes = arena_->is_in_place() ? 0 : ranges_.size(),
                .used_bytes = ranges_.used(),
                .evictions = evictions_};
    for (const Slot& entry : slots_) stats.pinned += entry.pins > 0;
    return stats;
  }

 private:
  static constexpr int kNone = -1;

  struct Slot {
    bool is_free() const { return digest.empty(); }  // and nothing else means anything

    std::string digest;
    std::optional<AdapterLayout> layout;
    std::shared_ptr<const Image> image;  // while pinned
    std::int64_t offset = 0;
    std::int64_t pins = 0;
    std::uint64_t last_use = 0;
    int missing = 0;  // layers that aren't published
    std::vector<bool> published = {};
  };

  // In place an adapter takes no range.
  std::int64_t range_bytes(const Image& image) const {
    return arena_->is_in_place() ? 0 : image.layout().max_layer_bytes();
  }

  std::byte* place_of(const Slot& entry, int layer) const {
    std::byte* arena = arena_->layer(layer);
    if (!arena_->is_in_place()) return arena + entry.offset;
    return arena + (entry.image->layer_data(layer) - arena);
  }

  void publish_locked(int slot, int layer) {
    Slot& entry = slots_[static_cast<std::size_t>(slot)];
    const auto l = static_cast<std::size_t>(layer);
    if (entry.published[l]) return;
    const AdapterLayout& layout = entry.image->layout();
    const std::int64_t start = (place_of(entry, layer) - arena_->layer(layer)) /
                               static_cast<std::int64_t>(size_of(layout.dtype()));
    for (int i = 0; i < static_cast<int>(shape_->layer(layer).size()); ++i) {
      const Block& block = layout.block(layer, i);
      if (block.rank == 0) continue;
      tables_.set(layer, i, slot, start + block.a_offset, start + block.b_offset, block.rank,
                  entry.image->scale(layer, i));
    }
    entry.published[l] = true;
    --entry.missing;
  }

  void check_fits(const Image& image) const {
    const AdapterLayout& layout = image.layout();
    if (layout.shape() != shape_ && !(*layout.shape() == *shape_)) {
      fail(Status::mismatch, "image", "the base model of the slot table", "another one");
    }
    if (layout.dtype() != arena_->dtype()) {
      fail(Status::mismatch, "image", "the arena's " + std::string(name_of(arena_->dtype())),
           std::string(name_of(layout.dtype())));
    }
    if (arena_->is_in_place()) {
      const std::byte* first = image.layer_data(0);
      const std::byte* region = arena_->layer(0);
      if (first >= region && first < region + arena_->bytes_per_layer()) return;
      fail(Status::mismatch, "image", "one of the arena's own store", "another store's");
    }
    if (layout.max_layer_bytes() > ranges_.size()) {
      fail(Status::invalid_argument, "image",
           "at most the arena's " + std::to_string(ranges_.size()) + " bytes per layer",
           std::to_string(layout.max_layer_bytes()));
    }
  }

  // A digest names one adapter, but it comes from outside: another layout must not be copied into
  // the range that was made for the first one.
  bool fits(int slot, const Image& image) const {
    return *slots_[static_cast<std::size_t>(slot)].layout == image.layout();
  }

  int find_locked(const std::string& digest) const {
    const auto entry = by_digest_.find(digest);
    return entry == by_digest_.end() ? kNone : entry->second;
  }

  const Slot& taken(int slot) const {
    check_index("slot", slot, num_slots());
    const Slot& entry = slots_[static_cast<std::size_t>(slot)];
    if (entry.is_free()) {
      fail(Status::invalid_argument, "slot " + std::to_string(slot), "one with an adapter",
           "a free one");
    }
    return entry;
  }

  Slot& pinned(int slot) {
    if (taken(slot).pins == 0) {
      fail(Status::invalid_argument, "slot " + std::to_string(slot), "a pinned one", "an idle one");
    }
    return slots_[static_cast<std::size_t>(slot)];
  }

  double cost(const RangeAllocator::Range& range) const {
    if (range.owner == RangeAllocator::kFree) return 0;
    const Slot& entry = slots_[static_cast<std::size_t>(range.owner)];
    if (entry.pins > 0) return std::numeric_limits<double>::infinity();
    return static_cast<double>(entry.layout->bytes()) /
           static_cast<double>(std::max<std::uint64_t>(clock_ - entry.last_use, 1));
  }

  // Which slots to evict for a range of `need` bytes and an index (maybe none), or nothing when
  // even all idle ones would not do. A window holds at least one adapter, whose index is freed with
  // it, because it is only looked for when no free range is large enough.
  std::optional<std::vector<int>> choose_victims(std::int64_t need) const {
    const auto range_cost = [this](const RangeAllocator::Range& range) { return cost(range); };
    const bool has_room = ranges_.largest_free() >= need;
    const bool has_index = by_digest_.size() < slots_.size();
    std::vector<int> victims;
    if (has_room && has_index) return victims;
    const Ranges window = need == 0  ? Ranges{}
                          : has_room ? cheapest_used(ranges_.ranges(), range_cost)
                                     : cheapest_window(ranges_.ranges(), need, range_cost);
    if (window.empty()) return std::nullopt;
    for (const RangeAllocator::Range& range : window) {
      if (range.owner != RangeAllocator::kFree) victims.push_back(range.owner);
    }
    return victims;
  }

  std::string busy_state() const {
    const auto pinned =
        std::ranges::count_if(slots_, [](const Slot& entry) { return entry.pins > 0; });
    return std::to_string(pinned) + " of " + std::to_string(slots_.size()) + " slots pinned, " +
           std::to_string(ranges_.used()) + " of " + std::to_string(ranges_.size()) +
           " bytes taken";
  }

  int free_index() const {
    const auto entry =
        std::ranges::find_if(slots_, [](const Slot& slot) { return slot.is_free(); });
    return static_cast<int>(entry - slots_.begin());
  }

  // The rows are cleared before the range can belong to anyone else.
  void evict(int slot) {
    tables_.clear(slot);
    const Slot entry = std::exchange(slots_[static_cast<std::size_t>(slot)], Slot{});
    if (!arena_->is_in_place()) ranges_.free(entry.offset);
    by_digest_.erase(entry.digest);
    evictions_ += !arena_->is_in_place();  // where nothing is lost
  }

  const std::shared_ptr<const ModelShape> shape_;
  const std::shared_ptr<Arena> arena_;
  mutable std::mutex mutex_;
  RangeAllocator ranges_;
  std::vector<Slot> slots_;
  LoraTables tables_;
  std::unordered_map<std::string, int> by_digest_;
  std::uint64_t clock_ = 0;  // acquires and releases
  std::int64_t evictions_ = 0;
};

namespace {

int checked_slots(const ModelShape* shape, const Arena* arena, int num_slots) {
  if (shape == nullptr) fail(Status::invalid_argument, "shape", "a model shape", "null");
  if (arena == nullptr) fail(Status::invalid_argument, "arena", "an arena", "null");
  check_positive("num_slots", num_slots);
  if (shape->num_layers() != arena->num_layers()) {
    fail(Status::invalid_argument, "arena",
         std::to_string(shape->num_layers()) + " layers as in the model shape",
         std::to_string(arena->num_layers()));
  }
  return num_slots;
}

}  // namespace

SlotTable::SlotTable(std::shared_ptr<const ModelShape> shape, std::shared_ptr<Arena> arena,
                     int num_slots) {
  num_slots = checked_slots(shape.get(), arena.get(), num_slots);
  impl_ = std::make_unique<Impl>(std::move(shape), std::move(arena), num_slots);
}

SlotTable::~SlotTable() = default;

const std::shared_ptr<Arena>& SlotTable::arena() const noexcept { return impl_->arena(); }

SlotTable::Acquired SlotTable::acquire(std::shared_ptr<const Image> image) {
  if (image == nullptr) fail(Status::invalid_argument, "image", "an image", "null");
  return impl_->acquire(std::move(image));
}

bool SlotTable::can_acquire(const Image& image) const { return impl_->can_acquire(image); }
void SlotTable::release(int slot) { impl_->release(slot); }
int SlotTable::find(const std::string& digest) const { return impl_->find(digest); }
void SlotTable::publish(int slot, int layer) { impl_->publish(slot, layer); }
void SlotTable::unpublish(int slot, int layer) { impl_->unpublish(slot, layer); }

bool SlotTable::is_published(int slot, int layer) const { return impl_->is_published(slot, layer); }

std::byte* SlotTable::layer_data(int slot, int layer) { return impl_->layer_data(slot, layer); }

std::shared_ptr<const Image> SlotTable::image(int slot) const { return impl_->image(slot); }
int SlotTable::num_slots() const noexcept { return impl_->num_slots(); }
int SlotTable::num_rows() const noexcept { return impl_->tables().num_rows(); }
std::span<const std::int64_t> SlotTable::slots() const noexcept { return impl_->tables().slots(); }
std::span<const float> SlotTable::scales() const noexcept { return impl_->tables().scales(); }

const std::int64_t* SlotTable::device_slots() const noexcept {
  return impl_->tables().device_slots();
}

const float* SlotTable::device_scales() const noexcept { return impl_->tables().device_scales(); }

void SlotTable::upload(Stream& stream) { impl_->upload(stream, 0, impl_->num_layers()); }

void SlotTable::upload(Stream& stream, int layer) {
  check_index("layer", layer, impl_->num_layers());
  impl_->upload(stream, layer, layer + 1);
}

SlotTable::Stats SlotTable::stats() const { return impl_->stats(); }

}  // namespace toppings
