// SPDX-License-Identifier: Apache-2.0
#include <omp.h>
#include <toppings/error.h>
#include <toppings/lora.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/items.h"
#include "cpu/kernels.h"
#include "cpu/products.h"
#include "lora_serial.h"
#include "stages.h"

namespace toppings {
namespace {

using cpu::Item;
using cpu::Product;

// Multiply-adds below which waking other threads costs more than it gains.
constexpr double kSerialCost = 256 * 1024;

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

// The items of one thread; others take from it when they have none left. A cache line of its own.
struct alignas(64) Share {
  std::atomic<std::int64_t> next;
  std::int64_t end;
};

// Grows to the largest call of a thread and stays.
struct Workspace {
  std::vector<std::int32_t> plan;
  std::vector<Product> products;
  std::vector<Item> items;
  Buffer v, scratch, shares;
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

// A of an item, as far as the kernels for few tokens prefetch it: the hardware does the rest.
std::int64_t prefetched_a(const LoraForward& args, const Item& item) {
  return std::min(item.product->rank, cpu::kStreams) * args.in *
         static_cast<std::int64_t>(size_of(args.a_dtype));
}

// next: what the same thread will most likely do after this; may be null.
void expand_item(const cpu::Kernels& kernels, const LoraForward& args, const Item& item,
                 const float* v, std::int64_t v_stride, std::byte* scratch,
                 const Item* next = nullptr) {
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
      .next = next == nullptr ? nullptr : next->product->a,
      .next_bytes = next == nullptr ? 0 : prefetched_a(args, *next),
  });
}

// ---- all items

int threads_for(double cost) {
  return cost < kSerialCost || omp_in_parallel() ? 1 : omp_get_max_threads();
}

// run(item, thread) for all items. Every thread first takes its share from left to right, as
// torch's own loops do, so that it finds in its cache the rows of x and y that it wrote there; then
// it helps the others. Always the whole team: libgomp ends the threads a smaller one leaves over.
template <class F>
void for_each(Workspace& work, int threads, F run) {
  const auto count = static_cast<std::int64_t>(work.items.size());
  if (threads == 1) {
    for (std::int64_t i = 0; i < count; ++i) run(work.items[i], 0);
    return;
  }
  Share* shares = work.shares.get<Share>(threads);
  for (int t = 0; t < threads; ++t) {
    new (&shares[t]) Share{.next = count * t / threads, .end = count * (t + 1) / threads};
  }
#pragma omp parallel
  {
    const int thread = omp_get_thread_num();
    for (int t = 0; t < threads; ++t) {
      Share& share = shares[(thread + t) % threads];
      for (;;) {
        const std::int64_t i = share.next.fetch_add(1, std::memory_order_relaxed);
        if (i >= share.end) break;
        run(work.items[i], thread);
      }
    }
  }
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
    tokens = std::min(tokens, cpu::kMaxBlock);
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
  for_each(work, threads, [&](const Item& from, int thread) {
    Item item = from;
    const Product& product = *item.product;
    item.end = product.rank;
    shrink_item(kernels, args, item, scratch.v(thread), product.rank, true);
    item.end = product.width;
    const Item* next = &from == &work.items.back() ? nullptr : &from + 1;
    expand_item(kernels, args, item, scratch.v(thread), product.rank, scratch.kernel(thread), next);
  });
}

// One stage after the other, each split among all threads.
void forward_in_phases(const cpu::Kernels& kernels, const LoraForward& args, Workspace& work,
                       int threads) {
  const Scratch scratch(work, threads);
  const Product& last = work.products.back();
  float* v = work.v.get<float>(last.v_begin + last.num_tokens * last.rank);

  cpu::make_shrink_items(work.products, args.in, threads, kernels, work.items);
  for_each(work, threads, [&](const Item& item, int) {
    const Product& product = *item.product;
    shrink_item(kernels, args, item,
                v + product.v_begin + item.first_token * product.rank + item.begin, product.rank);
  });
  cpu::make_expand_items(work.products, threads, kernels, work.items);
  for_each(work, threads, [&](const Item& item, int thread) {
    const Product& product = *item.product;
    expand_item(kernels, args, item, v + product.v_begin + item.first_token * product.rank,
                product.rank, scratch.kernel(thread));
  });
}

// by_caller: by the calling thread alone, whatever the cost.
void forward(const LoraForward& args, bool by_caller) {
  cpu::check_batch(args.batch);
  cpu::check_x(args);
  cpu::check_alias(args, cpu::check_y(args));
  Workspace& work = workspace();
  cpu::resolve(args, true, true, work.plan, work.products);
  if (work.products.empty()) return;

  const cpu::Kernels& kernels = cpu::kernels();
  const double cost = cpu::shrink_cost(work.products, args.in) + cpu::expand_cost(work.products);
  const int threads = by_caller ? 1 : threads_for(cost);
  if (cpu::make_fused_items(work.products, args.in, threads, work.items)) {
    forward_fused(kernels, args, work, threads);
  } else {
    forward_in_phases(kernels, args, work, threads);
  }
}

}  // namespace

void lora_forward(const LoraForward& args) { forward(args, false); }

void lora_forward_serial(const LoraForward& args) { forward(args, true); }

void lora_shrink(const LoraShrink& shrink) {
  const LoraForward args = as_forward(shrink);
  cpu::check_batch(args.batch);
  cpu::check_x(args);
  Workspace& work = workspace();
  cpu::resolve(args, true, false, work.plan, work.products);

  const LoraBatch& batch = shrink.batch;
  std::fill_n(shrink.v, batch.num_projections * batch.tokens * batch.max_rank, 0.0f);
  if (work.products.empty()) return;
  const cpu::Kernels& kernels = cpu::kernels();
  const int threads = threads_for(cpu::shrink_cost(work.products, args.in));
  const Scratch scratch(work, threads);
  cpu::make_shrink_items(work.products, args.in, threads, kernels, work.items);
  for_each(work, threads, [&](const Item& item, int thread) {
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
  const LoraForward args = as_forward(expand);
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
  const int threads = threads_for(cpu::expand_cost(work.products));
  const Scratch scratch(work, threads);
  cpu::make_expand_items(work.products, threads, kernels, work.items);
  for_each(work, threads, [&](const Item& item, int thread) {
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
