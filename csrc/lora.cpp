// SPDX-License-Identifier: Apache-2.0
#include <omp.h>
#include <toppings/error.h>
#include <toppings/lora.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "cpu/products.h"

namespace toppings {
namespace {

using cpu::Product;

// Tokens of a segment that one thread takes together: at most so many that their v and the part of
// x that a panel meets stay in the second-level cache, and when there are more, at least so many
// that filling the panels costs little beside using them.
constexpr std::int64_t kMaxBlock = 192;
constexpr std::int64_t kMinBlock = 64;
constexpr std::int64_t kMinSplitBlock = 32;  // where threads would be idle otherwise

// Multiply-adds below which waking other threads costs more than it gains.
constexpr double kSerialCost = 256 * 1024;

// Items per thread, where there is a choice: a thread that is late then doesn't hold up the others.
constexpr double kItemsPerThread = 2;

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

// ---- one item

// prefetches: the same thread expands next.
void shrink_item(const cpu::Kernels& kernels, const LoraForward& args, const Item& item, float* v,
                 std::int64_t v_stride, bool prefetches = false) {
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
      .next = product.b,
      .next_rows = prefetches ? std::min(product.rank, cpu::kStreams) : 0,
      .next_bytes = product.width * static_cast<std::int64_t>(size_of(args.b_dtype)),
  });
}

void expand_item(const cpu::Kernels& kernels, const LoraForward& args, const Item& item,
                 const float* v, std::int64_t v_stride, std::byte* scratch) {
  const Product& product = *item.product;
  const bool all_bf16 =
      args.dtype == DType::bf16 && args.a_dtype == DType::bf16 && args.b_dtype == DType::bf16;
  const cpu::ExpandFn expand =
      all_bf16 && kernels.expand_bf16 != nullptr
          ? kernels.expand_bf16
          : kernels.expand[static_cast<int>(args.dtype)][static_cast<int>(args.b_dtype)];
  expand({
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
      .scratch = scratch,
  });
}

// The beginning of an item's A, into the second-level cache: in small models a large part of it.
// The hardware prefetches the rest.
void prefetch_a(const LoraForward& args, const Item& item) {
  constexpr std::int64_t kMost = 8 * 1024, kLine = 64;
  const Product& product = *item.product;
  const std::int64_t a_bytes =
      product.rank * args.in * static_cast<std::int64_t>(size_of(args.a_dtype));
  for (std::int64_t at = 0; at < std::min(a_bytes, kMost); at += kLine) {
    __builtin_prefetch(product.a + at, 0, 2);
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

// Blocks of nearly equal size of all tokens of a product, each of at most `most`.
template <class Push>
void for_blocks(const Product& product, std::int64_t most, Push push) {
  const std::int64_t blocks = (product.num_tokens + most - 1) / most;
  std::int64_t first = 0;
  for (std::int64_t block = 1; block <= blocks; ++block) {
    const std::int64_t end = product.num_tokens * block / blocks;
    push(first, end - first);
    first = end;
  }
}

// The most tokens of a product that cost no more than `target`, within the bounds of a block.
std::int64_t block_tokens(double target, double token_cost) {
  return static_cast<std::int64_t>(std::clamp(target / token_cost, static_cast<double>(kMinBlock),
                                              static_cast<double>(kMaxBlock)));
}

// Whole products, in blocks that cost about `target`.
void make_blocks(Workspace& work, std::int64_t in, double target) {
  work.items.clear();
  for (const Product& product : work.products) {
    const double token_cost =
        static_cast<double>(product.rank) * static_cast<double>(in + product.width);
    for_blocks(product, block_tokens(target, token_cost),
               [&](std::int64_t first, std::int64_t tokens) {
                 work.items.push_back({&product, first, tokens, 0, 0});
               });
  }
}

// One phase of all products, split along `extent` (rank rows or columns) at multiples of `tile`
// where all tokens would cost much more than `target`, and where one tile still costs more than
// `limit`, along the tokens. unit_cost: of one token through one rank row or column.
template <class Extent, class UnitCost>
void make_split_blocks(Workspace& work, double target, double limit, std::int64_t tile,
                       Extent extent, UnitCost unit_cost) {
  work.items.clear();
  for (const Product& product : work.products) {
    const std::int64_t end = extent(product);
    const double cost = static_cast<double>(product.num_tokens) * unit_cost(product);
    const auto fitting =
        static_cast<std::int64_t>(std::min(target / cost, static_cast<double>(end)));
    const std::int64_t size = std::max<std::int64_t>(1, (fitting + tile - 1) / tile) * tile;
    const double parts = std::ceil(cost * static_cast<double>(std::min(size, end)) / limit);
    const auto most = static_cast<std::int64_t>(
        std::ceil(static_cast<double>(product.num_tokens) / std::max(parts, 1.0)));
    for_blocks(
        product, std::min(kMaxBlock, std::max(most, kMinSplitBlock)),
        [&](std::int64_t first, std::int64_t tokens) {
          for (std::int64_t begin = 0; begin < end; begin += size) {
            work.items.push_back({&product, first, tokens, begin, std::min(begin + size, end)});
          }
        });
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
      work, item_target(cost, threads), cost / threads, kernels.rank_tile,
      [](const Product& p) { return p.rank; },
      [in](const Product&) { return static_cast<double>(in); });
}

void make_expand_items(Workspace& work, const cpu::Kernels& kernels, double cost, int threads) {
  make_split_blocks(
      work, item_target(cost, threads), cost / threads, kernels.column_tile,
      [](const Product& p) { return p.width; },
      [](const Product& p) { return static_cast<double>(p.rank); });
}

// Of every thread: v of a block of tokens, and what the kernels need.
class Scratch {
 public:
  Scratch(Workspace& work, int threads) {
    std::int64_t rank = 0, tokens = 0;
    for (const Product& product : work.products) {
      rank = std::max(rank, product.rank);
      tokens = std::max(tokens, product.num_tokens);
    }
    tokens = std::min(tokens, kMaxBlock);
    // Whole pairs of cache lines.
    v_bytes_ = (static_cast<std::size_t>(tokens * rank) * sizeof(float) + 127) / 128 * 128;
    stride_ = (v_bytes_ + cpu::scratch_bytes(tokens, rank) + 127) / 128 * 128;
    data_ = work.scratch.get<std::byte>(static_cast<std::int64_t>(stride_) * threads);
  }
  float* v(int thread) const { return reinterpret_cast<float*>(data_ + index(thread)); }
  std::byte* kernel(int thread) const { return data_ + index(thread) + v_bytes_; }

 private:
  std::size_t index(int thread) const { return static_cast<std::size_t>(thread) * stride_; }

  std::size_t v_bytes_, stride_;
  std::byte* data_;
};

// Both stages of a token block by one thread, v in its scratch.
void forward_fused(const cpu::Kernels& kernels, const LoraForward& args, Workspace& work,
                   int threads) {
  const Scratch scratch(work, threads);
  for_each(work.items, threads, [&](const Item& from, int thread) {
    Item item = from;
    const Product& product = *item.product;
    item.end = product.rank;
    shrink_item(kernels, args, item, scratch.v(thread), product.rank, true);
    item.end = product.width;
    // Most likely this thread's next one.
    if (&from != &work.items.back()) prefetch_a(args, *(&from + 1));
    expand_item(kernels, args, item, scratch.v(thread), product.rank, scratch.kernel(thread));
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
                product.rank, scratch.kernel(thread));
  });
}

}  // namespace

void lora_forward(const LoraForward& args) {
  cpu::check_batch(args.batch);
  cpu::check_x(args);
  cpu::check_alias(args, cpu::check_y(args));
  Workspace& work = workspace();
  cpu::resolve(args, true, true, work.plan, work.products);
  if (work.products.empty()) return;

  const cpu::Kernels& kernels = cpu::kernels();
  const double cost = shrink_cost(work, args.in) + expand_cost(work);
  const int threads = threads_for(cost);
  const double target = item_target(cost, threads);
  double largest = 0;  // of the blocks one thread would take as a whole
  for (const Product& p : work.products) {
    const auto tokens = static_cast<double>(std::min(p.num_tokens, kMinBlock));
    largest = std::max(
        largest, tokens * static_cast<double>(p.rank) * static_cast<double>(args.in + p.width));
  }
  if (largest <= target) {
    make_blocks(work, args.in, target);
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
  cpu::check_batch(args.batch);
  cpu::check_x(args);
  Workspace& work = workspace();
  cpu::resolve(args, true, false, work.plan, work.products);

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
  cpu::check_batch(args.batch);
  cpu::check_y(args);
  Workspace& work = workspace();
  cpu::resolve(args, false, true, work.plan, work.products);
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
    expand_item(kernels, args, item, v, product.rank, scratch.kernel(thread));
  });
}

}  // namespace toppings
