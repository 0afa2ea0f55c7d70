// SPDX-License-Identifier: Apache-2.0
#include <cuda_runtime_api.h>
#include <toppings/error.h>
#include <toppings/lora_cuda.h>
#include <toppings/lora_plan.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "check.h"
#include "cpu/products.h"
#include "cuda/call.h"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/plan_kernel.cuh"

namespace toppings::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // not to be found by the next call
  fail(error == cudaErrorMemoryAllocation ? Status::out_of_memory : Status::unsupported, what,
       "success", cudaGetErrorString(error));
}

Kernels kernels_of(DType math) {
  switch (math) {
    case DType::bf16:
      return bf16_kernels();
    case DType::f16:
      return f16_kernels();
    default:
      return f32_kernels();
  }
}

struct Device {
  Gpu gpu;
  bool overlaps;  // its kernels may be launched before the previous one of the stream has ended
};

// Both the device and the code that runs must know griddepcontrol. __CUDA_ARCH__, by which the wait
// is compiled, is the PTX version, whether the code comes as a cubin or as PTX: compute_80 that was
// compiled on the spot for sm_90 doesn't wait.
bool waits_for_previous(void (*kernel)(LoraParams)) {
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)),
        "the attributes of a kernel");
  return attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
}

int blocks_of(void (*kernel)(LoraParams), int threads, int shared_bytes) {
  const auto* function = reinterpret_cast<const void*>(kernel);
  int blocks = 0;
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
        "shared memory of a kernel");
  // A hint. Without it the driver may leave too little shared memory for the blocks counted below.
  check(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "the shared memory carveout of a kernel");
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, threads,
                                                      static_cast<std::size_t>(shared_bytes)),
        "occupancy of a kernel");
  return std::max(blocks, 1);
}

// Of the current device; asked for once.
Device device_for(DType math) {
  static std::mutex mutex;
  static std::map<std::pair<int, DType>, Device> devices;
  int number = 0;
  check(cudaGetDevice(&number), "the current CUDA device");
  const std::lock_guard lock(mutex);
  const auto found = devices.find({number, math});
  if (found != devices.end()) return found->second;
  int multiprocessors = 0, major = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, number),
        "the number of multiprocessors");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, number),
        "the compute capability");
  const Kernels kernels = kernels_of(math);
  const Device device{
      .gpu = {.multiprocessors = multiprocessors,
              .narrow_blocks =
                  blocks_of(kernels.narrow, kThreads<NarrowTile>, kSharedBytes<NarrowTile>),
              .wide_blocks = blocks_of(kernels.wide, kThreads<WideTile>, kSharedBytes<WideTile>)},
      .overlaps =
          major >= 9 && waits_for_previous(kernels.narrow) && waits_for_previous(kernels.wide)};
  devices.emplace(std::pair{number, math}, device);
  return device;
}

void check_at_most(const char* what, std::int64_t value, std::int64_t most) {
  if (value > most)
    fail(Status::invalid_argument, what, "<= " + std::to_string(most), std::to_string(value));
}

// Positions in a row are 32-bit numbers in the kernels; offsets in memory have 64 bits.
void check_call(const Call& call) {
  constexpr std::int64_t kLargest = (std::int64_t{1} << 31) - (1 << 16);
  const LoraForward& args = call.args;
  cpu::check_batch(args.batch);
  lora_plan_size(args.batch.tokens, args.batch.num_slots);
  check_at_most("num_slots", args.batch.num_slots, kLargest);
  check_at_most("max_rank", args.batch.max_rank, 1 << 20);
  if (call.shrinks) {
    cpu::check_x(args);
    check_at_most("in", args.in, kLargest);
  }
  if (call.expands) check_at_most("the sum of widths", cpu::check_y(args), kLargest);
  if (call.shrinks && call.expands) cpu::check_alias(args, cpu::check_y(args));
}

std::size_t workspace_of(const Call& call) {
  check_call(call);
  std::size_t bytes = 0;
  for_each_part(call, [&](const Call& part) {
    const Config config = choose(problem_of(part), {1, 1, 1});  // the GPU doesn't matter for it
    bytes = std::max(bytes, static_cast<std::size_t>(config.workspace));
  });
  return bytes;
}

template <class Tile>
void launch_tile(void (*kernel)(LoraParams), const LoraParams& params, const Config& config,
                 const Device& device, void* stream) {
  check(launch(kernel,
               {.grid = {static_cast<unsigned>(config.blocks)},
                .block = {static_cast<unsigned>(kThreads<Tile>)},
                .shared_bytes = kSharedBytes<Tile>,
                .stream = stream,
                .overlaps_previous = device.overlaps},
               params),
        "the launch of a LoRA kernel");
}

void run(const Call& call, const Launch& given) {
  const std::size_t needed = workspace_of(call);
  if (given.workspace_bytes < needed) {
    fail(Status::invalid_argument, "workspace", std::to_string(needed) + " bytes",
         std::to_string(given.workspace_bytes));
  }
  if (needed > 0 && reinterpret_cast<std::uintptr_t>(given.workspace) % 256 != 0) {
    fail(Status::invalid_argument, "workspace", "an address on 256 bytes", "another");
  }
  for_each_part(call, [&](const Call& part) {
    const DType math = math_of(part);
    const Device device = device_for(math);
    const Kernels kernels = kernels_of(math);
    const Config config = choose(problem_of(part), device.gpu);
    for_each_launch(
        part, config, static_cast<std::byte*>(given.workspace),
        [&](std::int32_t* plan, const LoraParams& params) {
          lora_plan(params.token_slots, params.tokens, params.num_slots, plan, given.stream);
        },
        [&](const LoraParams& params) {
          if (config.wide) {
            launch_tile<WideTile>(kernels.wide, params, config, device, given.stream);
          } else {
            launch_tile<NarrowTile>(kernels.narrow, params, config, device, given.stream);
          }
        });
  });
}

}  // namespace

bool is_built() noexcept { return true; }

std::size_t lora_workspace_bytes(const LoraForward& args) { return workspace_of(call_of(args)); }
std::size_t lora_workspace_bytes(const LoraShrink& args) { return workspace_of(call_of(args)); }
std::size_t lora_workspace_bytes(const LoraExpand& args) { return workspace_of(call_of(args)); }

std::size_t lora_workspace_counters_bytes() noexcept {
  return static_cast<std::size_t>(kCountersBytes);
}

void lora_forward(const LoraForward& args, const Launch& launch) { run(call_of(args), launch); }

void lora_expand(const LoraExpand& args, const Launch& launch) { run(call_of(args), launch); }

void lora_shrink(const LoraShrink& args, const Launch& launch) {
  const Call call = call_of(args);
  check_call(call);
  const LoraBatch& batch = args.batch;
  const auto bytes =
      static_cast<std::size_t>(batch.num_projections * batch.tokens * batch.max_rank) *
      sizeof(float);
  if (bytes > 0) {
    check(cudaMemsetAsync(args.v, 0, bytes, static_cast<cudaStream_t>(launch.stream)),
          "the memset of v");
  }
  run(call, launch);
}

void lora_plan(const std::int32_t* token_slots, std::int64_t tokens, std::int64_t num_slots,
               std::int32_t* plan, void* stream) {
  lora_plan_size(tokens, num_slots);
  check(launch(plan_kernel, plan_launch(stream),
               PlanParams{.token_slots = token_slots,
                          .plan = plan,
                          .num_slots = num_slots,
                          .tokens = static_cast<std::int32_t>(tokens)}),
        "the launch of the plan kernel");
}

std::uint64_t capture_id(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  check(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &id),
        "the stream's capture");
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

}  // namespace toppings::cuda
