// SPDX-License-Identifier: Apache-2.0
#include <omp.h>
#include <toppings/error.h>
#include <toppings/lora.h>

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/convert.h"
#include "cpu/kernels.h"
#include "cpu/plan.h"

namespace toppings {
namespace {

// Tokens that go through a projection together. Their v stays in the first-level cache, and 24 is a
// multiple of every kernel's tile.
constexpr std::int64_t kTokenBlock = 24;

// Multiply-adds below which waking other threads costs more than it gains.
constexpr double kSerialCost = 256 * 1024;

// Items per thread, at least: a thread that is late then doesn't hold up the others.
constexpr double kItemsPerThread = 4;

// ---- what a call works on

// One segment (the tokens of one slot) through one projection.
struct Product {
  const std::int32_t* tokens;
  std::int64_t num_tokens, rank, width;
  std::int64_t projection, column;  // column: where the projection begins in y
  const std::byte* a;               // null in expand
  const std::byte* b;               // null in shrink
  float scale;
  std::int64_t v_begin;  // in the workspace's v, when shrink and expand are separate phases
};

// What one thread takes at a time: some tokens of a product, and of its rank rows (shrink) or
// columns (expand) [begin, end).
struct Item {
  const Product* product;
  std::int64_t first_token, num_tokens, begin, end;
};

class Buffer {
 public:
  template <class T>
  T* get(std::int64_t count) {
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    if (bytes > bytes_) {
      data_.reset();
      bytes_ = 0;
      data_.reset(static_cast<std::byte*>(::operator new(bytes, kAlignment)));
      bytes_ = bytes;
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<std::byte, Free> data_;
  std::size_t bytes_ = 0;
};

// Grows to the largest call of a thread and stays.
struct Workspace {
  std::vector<std::int32_t> plan;
  std::vector<Product> products;
  std::vector<Item> items;
  Buffer v, scratch;
};

Workspace& workspace() {
  static thread_local Workspace instance;
  return instance;
}

// ---- checks, all of them before anything is written

void check_at_least(const char* what, std::int64_t value, std::int64_t least) {
  if (value < least)
    fail(Status::invalid_argument, what, ">= " + std::to_string(least), std::to_string(value));
}

void check_batch(const LoraBatch& batch) {
  check_at_least("tokens", batch.tokens, 0);
  check_at_least("num_slots", batch.num_slots, 0);
  check_at_least("num_projections", batch.num_projections, 0);
  check_at_least("max_rank", batch.max_rank, 0);
}

void check_x(const LoraForward& args) {
  check_at_least("in", args.in, 1);
  if (args.batch.tokens > 1) check_at_least("x_stride", args.x_stride, 0);
}

std::int64_t check_y(const LoraForward& args) {
  if (std::ssize(args.widths) != args.batch.num_projections) {
    fail(Status::invalid_argument, "widths",
         std::to_string(args.batch.num_projections) + " of them, one for each projection",
         std::to_string(args.widths.size()));
  }
  std::int64_t sum = 0;
  for (const std::int64_t width : args.widths) {
    check_at_least("width", width, 1);
    sum += width;
  }
  if (args.batch.tokens > 1) check_at_least("y_stride", args.y_stride, sum);
  return sum;
}

// Do rows of x and of y share a byte? Columns of one buffer that lie side by side don't.
void check_alias(const LoraForward& args, std::int64_t y_columns) {
  if (args.batch.tokens == 0) return;
  const auto size = static_cast<std::int64_t>(size_of(args.dtype));
  const auto x = reinterpret_cast<std::intptr_t>(args.x),
             y = reinterpret_cast<std::intptr_t>(args.y);
  const std::int64_t x_row = args.in * size, y_row = y_columns * size;
  const std::int64_t x_stride = args.x_stride * size, y_stride = args.y_stride * size;
  const std::int64_t last = args.batch.tokens - 1;
  if (x + last * x_stride + x_row <= y || y + last * y_stride + y_row <= x) return;
  if (last > 0 && x_stride == y_stride && x_stride > 0) {
    const std::int64_t offset = ((y - x) % x_stride + x_stride) % x_stride;
    if (offset >= x_row && offset + y_row <= x_stride) return;
  }
  fail(Status::invalid_argument, "x", "memory of its own", "memory that overlaps y");
}

void check_block(const char* what, std::int64_t offset, std::int64_t rank, std::int64_t row,
                 std::int64_t size, std::int64_t slot, std::int64_t projection) {
  if (offset >= 0 && rank <= size / row && offset <= size - rank * row) return;
  fail(Status::invalid_argument,
       std::string("slots[") + std::to_string(projection) + ", " + std::to_string(slot) + "]",
       std::to_string(rank) + " x " + std::to_string(row) + " elements within the " +
           std::to_string(size) + " of " + what,
       "offset " + std::to_string(offset));
}

// The plan, given or built, and from it the products; those of rank 0 are left out.
void resolve(const LoraForward& args, bool uses_a, bool uses_b, Workspace& work) {
  const LoraBatch& batch = args.batch;
  const std::int32_t* plan = batch.plan;
  if (plan != nullptr) {
    cpu::check_plan(plan, batch.token_slots, batch.tokens, batch.num_slots);
  } else {
    work.plan.resize(static_cast<std::size_t>(lora_plan_size(batch.tokens, batch.num_slots)));
    lora_plan(batch.token_slots, batch.tokens, batch.num_slots, work.plan.data());
    plan = work.plan.data();
  }
  const cpu::PlanView view(plan, batch.tokens);
  const auto a_size = static_cast<std::int64_t>(size_of(args.a_dtype));
  const auto b_size = static_cast<std::int64_t>(size_of(args.b_dtype));

  work.products.clear();
  std::int64_t v_size = 0;
  for (std::int32_t segment = 0; segment < view.num_segments; ++segment) {
    const std::int32_t* tokens = view.tokens + view.begins[segment];
    const std::int64_t num_tokens = view.begins[segment + 1] - view.begins[segment];
    const std::int64_t slot = batch.token_slots[tokens[0]];
    std::int64_t column = 0;
    for (std::int64_t s = 0; s < batch.num_projections; ++s) {
      const std::int64_t row = s * batch.num_slots + slot;
      const std::int64_t a_offset = batch.slots[row * 3], b_offset = batch.slots[row * 3 + 1];
      const std::int64_t rank = batch.slots[row * 3 + 2];
      if (rank < 0 || rank > batch.max_rank) {
        fail(Status::invalid_argument,
             "slots[" + std::to_string(s) + ", " + std::to_string(slot) + "]",
             "a rank from 0 to max_rank " + std::to_string(batch.max_rank), std::to_string(rank));
      }
      const std::int64_t width = uses_b ? args.widths[s] : 0;
      if (rank > 0) {
        if (uses_a) check_block("a", a_offset, rank, args.in, args.a_size, slot, s);
        if (uses_b) check_block("b", b_offset, rank, width, args.b_size, slot, s);
        work.products.push_back({
            .tokens = tokens,
            .num_tokens = num_tokens,
            .rank = rank,
            .width = width,
            .projection = s,
            .column = column,
            .a = uses_a ? static_cast<const std::byte*>(args.a) + a_offset * a_size : nullptr,
            .b = uses_b ? static_cast<const std::byte*>(args.b) + b_offset * b_size : nullptr,
            .scale = uses_b ? batch.scales[row] : 0.0f,
            .v_begin = v_size,
        });
        v_size += num_tokens * rank;
      }
      column += width;
    }
  }
}

// ---- one item

void shrink_item(const cpu::Kernels& kernels, const LoraForward& args, const Item& item, float* v,
                 std::int64_t v_stride) {
  const Product& product = *item.product;
  const std::int64_t row_bytes = args.in * static_cast<std::int64_t>(size_of(args.a_dtype));
  kernels.shrink[static_cast<int>(args.dtype)][static_cast<int>(args.a_dtype)]({
      .tokens = item.num_tokens,
      .ranks = item.end - item.begin,
      .in = args.in,
      .x = args.x,
      .x_stride = args.x_stride,
      .rows = product.tokens + item.first_token,
      .a = product.a + item.begin * row_bytes,
      .v = v,
      .v_stride = v_stride,
  });
}

// v rounded to bf16, rows of even length; kernels.h.
std::int64_t round_v(const float* v, std::int64_t v_stride, std::int64_t tokens, std::int64_t rank,
                     cpu::bf16* out) {
  const std::int64_t stride = (rank + 1) / 2 * 2;
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = 0; j < rank; ++j) {
      cpu::from_float(v[t * v_stride + j], out[t * stride + j]);
    }
    if (rank < stride) out[t * stride + rank] = {0};
  }
  return stride;
}

// Where kernel and dtypes allow, v is rounded to bf16, into `rounded` [num_tokens, rank + 1].
void expand_item(const cpu::Kernels& kernels, const LoraForward& args, const Item& item,
                 const float* v, std::int64_t v_stride, cpu::bf16* rounded) {
  const Product& product = *item.product;
  cpu::ExpandArgs expand{
      .tokens = item.num_tokens,
      .ranks = product.rank,
      .columns = item.end - item.begin,
      .v = v,
      .v_stride = v_stride,
      .b = product.b + item.begin * static_cast<std::int64_t>(size_of(args.b_dtype)),
      .b_stride = product.width,
      .scale = product.scale,
      .y = static_cast<std::byte*>(args.y) +
           (product.column + item.begin) * static_cast<std::int64_t>(size_of(args.dtype)),
      .y_stride = args.y_stride,
      .rows = product.tokens + item.first_token,
  };
  const bool all_bf16 =
      args.dtype == DType::bf16 && args.a_dtype == DType::bf16 && args.b_dtype == DType::bf16;
  if (all_bf16 && kernels.expand_bf16 != nullptr) {
    expand.v_stride = round_v(v, v_stride, item.num_tokens, product.rank, rounded);
    expand.v = rounded;
    kernels.expand_bf16(expand);
  } else {
    kernels.expand[static_cast<int>(args.dtype)][static_cast<int>(args.b_dtype)](expand);
  }
}

// ---- all items

int threads_for(double cost) {
  return cost < kSerialCost || omp_in_parallel() ? 1 : omp_get_max_threads();
}

// What one item may cost.
double item_target(double cost, int threads) {
  return threads == 1 ? std::numeric_limits<double>::infinity()
                      : cost / (threads * kItemsPerThread);
}

// run(item, thread) for all items. Always the whole team: libgomp ends the threads a smaller one
// leaves over.
template <class F>
void for_each(const std::vector<Item>& items, int threads, F run) {
  const auto count = static_cast<std::int64_t>(items.size());
  if (threads == 1) {
    for (std::int64_t i = 0; i < count; ++i) run(items[i], 0);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1)
  for (std::int64_t i = 0; i < count; ++i) run(items[i], omp_get_thread_num());
}

// Whole token blocks of every product.
void make_blocks(Workspace& work) {
  work.items.clear();
  for (const Product& product : work.products) {
    for (std::int64_t first = 0; first < product.num_tokens; first += kTokenBlock) {
      work.items.push_back(
          {&product, first, std::min(kTokenBlock, product.num_tokens - first), 0, 0});
    }
  }
}

// Token blocks, split further along `extent` (rank rows or columns) at multiples of `tile` where
// one would cost much more than `target`. unit_cost: of one token through one of them.
template <class Extent, class UnitCost>
void make_split_blocks(Workspace& work, double target, std::int64_t tile, Extent extent,
                       UnitCost unit_cost) {
  work.items.clear();
  for (const Product& product : work.products) {
    const std::int64_t end = extent(product);
    for (std::int64_t first = 0; first < product.num_tokens; first += kTokenBlock) {
      const std::int64_t tokens = std::min(kTokenBlock, product.num_tokens - first);
      const double per_unit = static_cast<double>(tokens) * unit_cost(product);
      const auto fitting =
          static_cast<std::int64_t>(std::min(target / per_unit, static_cast<double>(end)));
      const std::int64_t size = std::max<std::int64_t>(1, (fitting + tile - 1) / tile) * tile;
      for (std::int64_t begin = 0; begin < end; begin += size) {
        work.items.push_back({&product, first, tokens, begin, std::min(begin + size, end)});
      }
    }
  }
}

double shrink_cost(const Workspace& work, std::int64_t in) {
  double cost = 0;
  for (const Product& p : work.products) cost += static_cast<double>(p.num_tokens) * p.rank * in;
  return cost;
}

double expand_cost(const Workspace& work) {
  double cost = 0;
  for (const Product& p : work.products) {
    cost += static_cast<double>(p.num_tokens) * p.rank * p.width;
  }
  return cost;
}

void make_shrink_items(Workspace& work, const cpu::Kernels& kernels, std::int64_t in, double cost,
                       int threads) {
  make_split_blocks(
      work, item_target(cost, threads), kernels.rank_tile, [](const Product& p) { return p.rank; },
      [in](const Product&) { return static_cast<double>(in); });
}

void make_expand_items(Workspace& work, const cpu::Kernels& kernels, double cost, int threads) {
  make_split_blocks(
      work, item_target(cost, threads), kernels.column_tile,
      [](const Product& p) { return p.width; },
      [](const Product& p) { return static_cast<double>(p.rank); });
}

// Scratch of every thread: v of a token block, and the same rounded to bf16.
class Scratch {
 public:
  Scratch(Workspace& work, int threads) {
    std::int64_t rank = 0;
    for (const Product& product : work.products) rank = std::max(rank, product.rank);
    v_size_ = kTokenBlock * (rank + 1);
    stride_ = (v_size_ + (v_size_ + 1) / 2 + 31) / 32 * 32;  // whole pairs of cache lines
    data_ = work.scratch.get<float>(stride_ * threads);
  }
  float* v(int thread) const { return data_ + thread * stride_; }
  cpu::bf16* rounded(int thread) const { return reinterpret_cast<cpu::bf16*>(v(thread) + v_size_); }

 private:
  std::int64_t v_size_, stride_;
  float* data_;
};

// Both stages of a token block by one thread, v in its scratch.
void forward_fused(const cpu::Kernels& kernels, const LoraForward& args, Workspace& work,
                   int threads) {
  const Scratch scratch(work, threads);
  for_each(work.items, threads, [&](Item item, int thread) {
    const Product& product = *item.product;
    item.end = product.rank;
    shrink_item(kernels, args, item, scratch.v(thread), product.rank);
    item.end = product.width;
    expand_item(kernels, args, item, scratch.v(thread), product.rank, scratch.rounded(thread));
  });
}

// One stage after the other, each split among all threads.
void forward_in_phases(const cpu::Kernels& kernels, const LoraForward& args, Workspace& work,
                       int threads) {
  const Scratch scratch(work, threads);
  const Product& last = work.products.back();
  float* v = work.v.get<float>(last.v_begin + last.num_tokens * last.rank);

  make_shrink_items(work, kernels, args.in, shrink_cost(work, args.in), threads);
  for_each(work.items, threads, [&](const Item& item, int) {
    const Product& product = *item.product;
    shrink_item(kernels, args, item,
                v + product.v_begin + item.first_token * product.rank + item.begin, product.rank);
  });
  make_expand_items(work, kernels, expand_cost(work), threads);
  for_each(work.items, threads, [&](const Item& item, int thread) {
    const Product& product = *item.product;
    expand_item(kernels, args, item, v + product.v_begin + item.first_token * product.rank,
                product.rank, scratch.rounded(thread));
  });
}

}  // namespace

void lora_forward(const LoraForward& args) {
  check_batch(args.batch);
  check_x(args);
  check_alias(args, check_y(args));
  Workspace& work = workspace();
  resolve(args, true, true, work);
  if (work.products.empty()) return;

  const cpu::Kernels& kernels = cpu::kernels();
  const double cost = shrink_cost(work, args.in) + expand_cost(work);
  const int threads = threads_for(cost);
  double largest = 0;  // of the blocks one thread would take as a whole
  for (const Product& p : work.products) {
    const auto tokens = static_cast<double>(std::min(p.num_tokens, kTokenBlock));
    largest = std::max(
        largest, tokens * static_cast<double>(p.rank) * static_cast<double>(args.in + p.width));
  }
  if (largest <= item_target(cost, threads)) {
    make_blocks(work);
    forward_fused(kernels, args, work, threads);
  } else {
    forward_in_phases(kernels, args, work, threads);
  }
}

void lora_shrink(const LoraShrink& shrink) {
  const LoraForward args{.batch = shrink.batch,
                         .dtype = shrink.dtype,
                         .a_dtype = shrink.a_dtype,
                         .b_dtype = shrink.a_dtype,
                         .in = shrink.in,
                         .widths = {},
                         .x = shrink.x,
                         .x_stride = shrink.x_stride,
                         .y = nullptr,
                         .y_stride = 0,
                         .a = shrink.a,
                         .a_size = shrink.a_size,
                         .b = nullptr,
                         .b_size = 0};
  check_batch(args.batch);
  check_x(args);
  Workspace& work = workspace();
  resolve(args, true, false, work);

  const LoraBatch& batch = shrink.batch;
  std::fill_n(shrink.v, batch.num_projections * batch.tokens * batch.max_rank, 0.0f);
  if (work.products.empty()) return;
  const cpu::Kernels& kernels = cpu::kernels();
  const double cost = shrink_cost(work, args.in);
  const int threads = threads_for(cost);
  const Scratch scratch(work, threads);
  make_shrink_items(work, kernels, args.in, cost, threads);
  for_each(work.items, threads, [&](const Item& item, int thread) {
    const Product& product = *item.product;
    const std::int64_t ranks = item.end - item.begin;
    float* v = scratch.v(thread);
    shrink_item(kernels, args, item, v, ranks);
    for (std::int64_t t = 0; t < item.num_tokens; ++t) {
      const std::int64_t row =
          product.projection * batch.tokens + product.tokens[item.first_token + t];
      std::copy_n(v + t * ranks, ranks, shrink.v + row * batch.max_rank + item.begin);
    }
  });
}

void lora_expand(const LoraExpand& expand) {
  const LoraForward args{.batch = expand.batch,
                         .dtype = expand.dtype,
                         .a_dtype = expand.b_dtype,
                         .b_dtype = expand.b_dtype,
                         .in = 1,
                         .widths = expand.widths,
                         .x = nullptr,
                         .x_stride = 0,
                         .y = expand.y,
                         .y_stride = expand.y_stride,
                         .a = nullptr,
                         .a_size = 0,
                         .b = expand.b,
                         .b_size = expand.b_size};
  check_batch(args.batch);
  check_y(args);
  Workspace& work = workspace();
  resolve(args, false, true, work);
  for (const Product& product : work.products) {
    if (product.rank > expand.v_rank) {
      fail(Status::invalid_argument, "v",
           "at least " + std::to_string(product.rank) + " columns, the largest rank in use",
           std::to_string(expand.v_rank));
    }
  }
  if (work.products.empty()) return;

  const cpu::Kernels& kernels = cpu::kernels();
  const double cost = expand_cost(work);
  const int threads = threads_for(cost);
  const Scratch scratch(work, threads);
  make_expand_items(work, kernels, cost, threads);
  for_each(work.items, threads, [&](const Item& item, int thread) {
    const Product& product = *item.product;
    float* v = scratch.v(thread);
    for (std::int64_t t = 0; t < item.num_tokens; ++t) {
      const std::int64_t row =
          product.projection * expand.batch.tokens + product.tokens[item.first_token + t];
      std::copy_n(expand.v + row * expand.v_rank, product.rank, v + t * product.rank);
    }
    expand_item(kernels, args, item, v, product.rank, scratch.rounded(thread));
  });
}

}  // namespace toppings
