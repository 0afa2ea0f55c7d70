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
#include "cpu/products.h"

namespace toppings {
namespace {

using cpu::Product;

// Tokens that go through a projection together. Their v stays in the first-level cache, and 24 is a
// multiple of every kernel's tile.
constexpr std::int64_t kTokenBlock = 24;

// Multiply-adds below which waking other threads costs more than it gains.
constexpr double kSerialCost = 256 * 1024;

// Items per thread, at least: a thread that is late then doesn't hold up the others.
constexpr double kItemsPerThread = 4;

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
  cpu::check_batch(args.batch);
  cpu::check_x(args);
  cpu::check_alias(args, cpu::check_y(args));
  Workspace& work = workspace();
  cpu::resolve(args, true, true, work.plan, work.products);
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
    expand_item(kernels, args, item, v, product.rank, scratch.rounded(thread));
  });
}

}  // namespace toppings
