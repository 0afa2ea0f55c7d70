// SPDX-License-Identifier: Apache-2.0
#include <toppings/slot_table.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "check.h"
#include "eviction.h"
#include "range_allocator.h"

namespace toppings {

static_assert(RangeAllocator::kGranule % kBlockAlignment == 0);

class SlotTable::Impl {
 public:
  Impl(std::shared_ptr<const ModelShape> shape, std::shared_ptr<Arena> arena, int num_slots)
      : shape_(std::move(shape)),
        arena_(std::move(arena)),
        ranges_(arena_->bytes_per_layer(), num_slots),
        table_(static_cast<std::size_t>(num_slots)),
        slots_(static_cast<std::size_t>(shape_->num_rows()) * table_.size() * 3),
        scales_(static_cast<std::size_t>(shape_->num_rows()) * table_.size()) {}

  const std::shared_ptr<Arena>& arena() const noexcept { return arena_; }
  int num_slots() const noexcept { return static_cast<int>(table_.size()); }
  int num_rows() const noexcept { return shape_->num_rows(); }
  std::span<const std::int64_t> slots() const noexcept { return slots_; }
  std::span<const float> scales() const noexcept { return scales_; }

  Acquired acquire(std::shared_ptr<const Image> image) {
    std::vector<std::shared_ptr<const Image>> evicted;  // let go after the lock
    std::lock_guard lock(mutex_);
    check_fits(*image);
    if (const int slot = find_locked(image->digest()); slot >= 0) {
      Slot& entry = table_[static_cast<std::size_t>(slot)];
      ++entry.pins;
      entry.last_use = ++clock_;
      return {.slot = slot, .resident = entry.missing == 0};
    }
    const std::int64_t need = image->layout().max_layer_bytes();
    const std::optional<std::vector<int>> victims = choose_victims(need);
    if (!victims) {
      fail(Status::slots_busy, "slot table",
           "a free or idle slot and " + std::to_string(need) + " adjacent free or idle bytes",
           busy_state());
    }
    // Everything that can run out of memory comes first, so that a failure changes nothing.
    evicted.reserve(victims->size());
    std::vector<bool> published(static_cast<std::size_t>(shape_->num_layers()));
    const auto entry = by_digest_.try_emplace(image->digest(), kNone).first;
    for (const int victim : *victims) evicted.push_back(evict(victim));
    const int slot = free_index();
    entry->second = slot;
    table_[static_cast<std::size_t>(slot)] = {.image = std::move(image),
                                              .offset = *ranges_.allocate(need, slot),
                                              .pins = 1,
                                              .last_use = ++clock_,
                                              .missing = shape_->num_layers(),
                                              .published = std::move(published)};
    return {.slot = slot, .resident = false};
  }

  bool can_acquire(const Image& image) const {
    std::lock_guard lock(mutex_);
    check_fits(image);
    return find_locked(image.digest()) >= 0 ||
           choose_victims(image.layout().max_layer_bytes()).has_value();
  }

  void release(int slot) {
    std::lock_guard lock(mutex_);
    Slot& entry = pinned(slot);
    --entry.pins;
    entry.last_use = ++clock_;
  }

  int find(const std::string& digest) const {
    std::lock_guard lock(mutex_);
    return find_locked(digest);
  }

  void publish(int slot, int layer) {
    std::lock_guard lock(mutex_);
    Slot& entry = pinned(slot);
    const Image& image = *entry.image;
    const int num_projections = static_cast<int>(shape_->layer(layer).size());
    if (entry.published[static_cast<std::size_t>(layer)]) return;
    const std::int64_t start =
        entry.offset / static_cast<std::int64_t>(size_of(image.layout().dtype()));
    for (int projection = 0; projection < num_projections; ++projection) {
      const Block& block = image.layout().block(layer, projection);
      if (block.rank == 0) continue;
      const std::size_t cell = this->cell(shape_->row(layer, projection), slot);
      slots_[3 * cell] = start + block.a_offset;
      slots_[3 * cell + 1] = start + block.b_offset;
      slots_[3 * cell + 2] = block.rank;
      scales_[cell] = image.scale(layer, projection);
    }
    entry.published[static_cast<std::size_t>(layer)] = true;
    --entry.missing;
  }

  bool is_published(int slot, int layer) const {
    std::lock_guard lock(mutex_);
    check_index("slot", slot, num_slots());
    check_index("layer", layer, shape_->num_layers());
    const Slot& entry = table_[static_cast<std::size_t>(slot)];
    return entry.image != nullptr && entry.published[static_cast<std::size_t>(layer)];
  }

  std::byte* layer_data(int slot, int layer) {
    std::lock_guard lock(mutex_);
    return arena_->layer(layer) + pinned(slot).offset;
  }

  std::shared_ptr<const Image> image(int slot) const {
    std::lock_guard lock(mutex_);
    return taken(slot).image;
  }

  Stats stats() const {
    std::lock_guard lock(mutex_);
    Stats stats{.slots = num_slots(),
                .resident = static_cast<int>(by_digest_.size()),
                .pinned = 0,
                .arena_bytes = ranges_.size(),
                .used_bytes = ranges_.used(),
                .evictions = evictions_};
    for (const Slot& entry : table_) stats.pinned += entry.pins > 0;
    return stats;
  }

 private:
  static constexpr int kNone = -1;

  struct Slot {
    std::shared_ptr<const Image> image;  // null: the slot is free, and nothing else means anything
    std::int64_t offset = 0;
    std::int64_t pins = 0;
    std::uint64_t last_use = 0;
    int missing = 0;  // layers that aren't published
    std::vector<bool> published = {};
  };

  void check_fits(const Image& image) const {
    const AdapterLayout& layout = image.layout();
    if (layout.shape() != shape_ && !(*layout.shape() == *shape_)) {
      fail(Status::mismatch, "image", "the base model of the slot table", "another one");
    }
    if (layout.dtype() != arena_->dtype()) {
      fail(Status::mismatch, "image", "the arena's " + std::string(name_of(arena_->dtype())),
           std::string(name_of(layout.dtype())));
    }
    if (layout.max_layer_bytes() > ranges_.size()) {
      fail(Status::invalid_argument, "image",
           "at most the arena's " + std::to_string(ranges_.size()) + " bytes per layer",
           std::to_string(layout.max_layer_bytes()));
    }
  }

  int find_locked(const std::string& digest) const {
    const auto entry = by_digest_.find(digest);
    return entry == by_digest_.end() ? kNone : entry->second;
  }

  const Slot& taken(int slot) const {
    check_index("slot", slot, num_slots());
    const Slot& entry = table_[static_cast<std::size_t>(slot)];
    if (entry.image == nullptr) {
      fail(Status::invalid_argument, "slot " + std::to_string(slot), "one with an adapter",
           "a free one");
    }
    return entry;
  }

  Slot& pinned(int slot) {
    if (taken(slot).pins == 0) {
      fail(Status::invalid_argument, "slot " + std::to_string(slot), "a pinned one", "an idle one");
    }
    return table_[static_cast<std::size_t>(slot)];
  }

  double cost(const RangeAllocator::Range& range) const {
    if (range.owner == RangeAllocator::kFree) return 0;
    const Slot& entry = table_[static_cast<std::size_t>(range.owner)];
    if (entry.pins > 0) return std::numeric_limits<double>::infinity();
    return static_cast<double>(entry.image->layout().bytes()) /
           static_cast<double>(std::max<std::uint64_t>(clock_ - entry.last_use, 1));
  }

  // Which slots to evict for a range of `need` bytes and an index (maybe none), or nothing when
  // even all idle ones would not do. A window holds at least one adapter, whose index is freed with
  // it, because it is only looked for when no free range is large enough.
  std::optional<std::vector<int>> choose_victims(std::int64_t need) const {
    const auto range_cost = [this](const RangeAllocator::Range& range) { return cost(range); };
    const bool has_room = ranges_.largest_free() >= need;
    const bool has_index = by_digest_.size() < table_.size();
    std::vector<int> victims;
    if (has_room && has_index) return victims;
    const Ranges window = has_room ? cheapest_used(ranges_.ranges(), range_cost)
                                   : cheapest_window(ranges_.ranges(), need, range_cost);
    if (window.empty()) return std::nullopt;
    for (const RangeAllocator::Range& range : window) {
      if (range.owner != RangeAllocator::kFree) victims.push_back(range.owner);
    }
    return victims;
  }

  std::string busy_state() const {
    const auto pinned =
        std::ranges::count_if(table_, [](const Slot& entry) { return entry.pins > 0; });
    return std::to_string(pinned) + " of " + std::to_string(table_.size()) + " slots pinned, " +
           std::to_string(ranges_.used()) + " of " + std::to_string(ranges_.size()) +
           " bytes taken";
  }

  int free_index() const {
    const auto entry =
        std::ranges::find_if(table_, [](const Slot& slot) { return slot.image == nullptr; });
    return static_cast<int>(entry - table_.begin());
  }

  std::size_t cell(int row, int slot) const {
    return static_cast<std::size_t>(row) * table_.size() + static_cast<std::size_t>(slot);
  }

  // The rows are cleared before the range can belong to anyone else.
  std::shared_ptr<const Image> evict(int slot) {
    for (int row = 0; row < num_rows(); ++row) {
      const std::size_t cell = this->cell(row, slot);
      std::fill_n(slots_.begin() + static_cast<std::ptrdiff_t>(3 * cell), 3, 0);
      scales_[cell] = 0;
    }
    Slot entry = std::exchange(table_[static_cast<std::size_t>(slot)], Slot{});
    ranges_.free(entry.offset);
    by_digest_.erase(entry.image->digest());
    ++evictions_;
    return std::move(entry.image);
  }

  const std::shared_ptr<const ModelShape> shape_;
  const std::shared_ptr<Arena> arena_;
  mutable std::mutex mutex_;
  RangeAllocator ranges_;
  std::vector<Slot> table_;
  std::unordered_map<std::string, int> by_digest_;
  std::vector<std::int64_t> slots_;  // [num_rows, num_slots, 3]
  std::vector<float> scales_;        // [num_rows, num_slots]
  std::uint64_t clock_ = 0;          // acquires and releases
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

bool SlotTable::is_published(int slot, int layer) const { return impl_->is_published(slot, layer); }

std::byte* SlotTable::layer_data(int slot, int layer) { return impl_->layer_data(slot, layer); }

std::shared_ptr<const Image> SlotTable::image(int slot) const { return impl_->image(slot); }
int SlotTable::num_slots() const noexcept { return impl_->num_slots(); }
int SlotTable::num_rows() const noexcept { return impl_->num_rows(); }
std::span<const std::int64_t> SlotTable::slots() const noexcept { return impl_->slots(); }
std::span<const float> SlotTable::scales() const noexcept { return impl_->scales(); }
SlotTable::Stats SlotTable::stats() const { return impl_->stats(); }

}  // namespace toppings
