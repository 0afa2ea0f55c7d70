// SPDX-License-Identifier: Apache-2.0
#include <toppings/lora_cuda.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include "args.h"

// In a torch without CUDA this is null, and no CUDA tensor comes here.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(std::int32_t device_index, void** stream);

// The operators' kernels on CUDA devices, on torch's current stream.
namespace {

using namespace toppings::torch_ops;  // NOLINT: args.h is made for these files
using torch::stable::accelerator::DeviceGuard;

void* current_stream(Place place) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr &&
                      aoti_torch_get_current_cuda_stream(place.index, &stream) == 0,
                  "toppings: expected a current CUDA stream, got none");
  return stream;
}

// Memory for one stream, and whoever enqueues there: what a call enqueues must not be mixed with
// another thread's, since its kernels pass the plan and v on in the workspace.
struct Workspace {
  std::mutex mutex;
  std::uint64_t capture = 0;
  std::optional<Tensor> bytes;
};

// One workspace for each stream, from torch's allocator, kept and grown. What is captured into a
// graph gets one of its own, whose zeroing is captured with it: it is kept until the stream
// captures the next graph, and after that belongs to the graph's memory pool like any other of its
// temporaries.
Workspace& workspace_of(Place place, void* stream, bool captures) {
  // Never destroyed: when the process ends, CUDA may be gone before.
  static auto& mutex = *new std::mutex;
  static auto& workspaces = *new std::map<std::tuple<std::int32_t, void*, bool>, Workspace>;
  const std::lock_guard lock(mutex);
  return workspaces[{place.index, stream, captures}];
}

// Its mutex is held.
void provide(Workspace& workspace, const Tensor& like, std::size_t bytes, std::uint64_t capture) {
  const auto count = static_cast<std::int64_t>(bytes);
  if (workspace.bytes.has_value() && workspace.capture == capture &&
      workspace.bytes->size(0) >= count) {
    return;
  }
  Tensor made = torch::stable::new_empty(like, {&count, 1}, ScalarType::Byte);
  const auto counters = static_cast<std::int64_t>(toppings::cuda::lora_workspace_counters_bytes());
  Tensor zeros = torch::stable::narrow(made, 0, 0, counters);
  torch::stable::zero_(zeros);
  workspace.bytes = made;
  workspace.capture = capture;
}

// `run` with a stream and a workspace for args.
template <class Args, class F>
void launch(const Tensor& like, const Args& args, Place place, F run) {
  void* stream = current_stream(place);
  const std::size_t bytes = toppings::cuda::lora_workspace_bytes(args);
  if (bytes == 0) {
    run(args, toppings::cuda::Launch{.stream = stream});
    return;
  }
  const std::uint64_t capture = toppings::cuda::capture_id(stream);
  Workspace& workspace = workspace_of(place, stream, capture != 0);
  const std::lock_guard lock(workspace.mutex);
  provide(workspace, like, bytes, capture);
  run(args, toppings::cuda::Launch{
                .stream = stream,
                .workspace = workspace.bytes->mutable_data_ptr(),
                .workspace_bytes = static_cast<std::size_t>(workspace.bytes->size(0))});
}

void lora_forward_(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                   const Tensor& slots, const Tensor& scales, const Tensor& token_slots,
                   const std::vector<std::int64_t>& widths, const std::optional<Tensor>& plan,
                   std::int64_t max_rank) {
  translate([&] {
    const Place place = place_of(y);
    const DeviceGuard guard(place.index);
    launch(y, forward_args(y, x, a, b, slots, scales, token_slots, widths, plan, max_rank, place),
           place, [](const auto& args, const auto& launch) {
             toppings::cuda::lora_forward(args, launch);
           });
  });
}

Tensor lora_forward(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                    const Tensor& slots, const Tensor& scales, const Tensor& token_slots,
                    const std::vector<std::int64_t>& widths, const std::optional<Tensor>& plan,
                    std::int64_t max_rank) {
  Tensor result = torch::stable::new_empty(y, y.sizes());
  torch::stable::copy_(result, y);
  lora_forward_(result, x, a, b, slots, scales, token_slots, widths, plan, max_rank);
  return result;
}

Tensor lora_shrink(const Tensor& x, const Tensor& a, const Tensor& slots, const Tensor& token_slots,
                   std::int64_t max_rank, const std::optional<Tensor>& plan) {
  return translate([&] {
    const Place place = place_of(x);
    const DeviceGuard guard(place.index);
    toppings::LoraShrink args = shrink_args(x, a, slots, token_slots, max_rank, plan, place);
    Tensor v = new_v(x, args.batch);
    args.v = static_cast<float*>(v.mutable_data_ptr());
    launch(x, args, place,
           [](const auto& args, const auto& launch) { toppings::cuda::lora_shrink(args, launch); });
    return v;
  });
}

void lora_expand_(const Tensor& y, const Tensor& v, const Tensor& b, const Tensor& slots,
                  const Tensor& scales, const Tensor& token_slots,
                  const std::vector<std::int64_t>& widths, const std::optional<Tensor>& plan) {
  translate([&] {
    const Place place = place_of(y);
    const DeviceGuard guard(place.index);
    launch(y, expand_args(y, v, b, slots, scales, token_slots, widths, plan, place), place,
           [](const auto& args, const auto& launch) { toppings::cuda::lora_expand(args, launch); });
  });
}

Tensor lora_plan(const Tensor& token_slots, std::int64_t num_slots) {
  return translate([&] {
    const Place place = place_of(token_slots);
    const DeviceGuard guard(place.index);
    Tensor plan = new_plan(token_slots, num_slots, place);
    toppings::cuda::lora_plan(
        static_cast<const std::int32_t*>(token_slots.const_data_ptr()), token_slots.size(0),
        num_slots, static_cast<std::int32_t*>(plan.mutable_data_ptr()), current_stream(place));
    return plan;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(toppings, CUDA, m) {
  m.impl("lora_forward", TORCH_BOX(&lora_forward));
  m.impl("lora_forward_", TORCH_BOX(&lora_forward_));
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_expand_", TORCH_BOX(&lora_expand_));
  m.impl("lora_plan", TORCH_BOX(&lora_plan));
}
