// SPDX-License-Identifier: Apache-2.0
#include <toppings/device.h>
#include <toppings/error.h>
#include <toppings/lora_cuda.h>

#include "check.h"

// lora_cuda.h and device.h's GPUs in a build without nvcc.
namespace toppings::cuda {
namespace {

[[noreturn]] void refuse() {
  fail(Status::unsupported, "toppings", "a build with the CUDA part", "one made without nvcc");
}

}  // namespace

bool is_built() noexcept { return false; }
std::size_t lora_workspace_bytes(const LoraForward&) { refuse(); }
std::size_t lora_workspace_bytes(const LoraShrink&) { refuse(); }
std::size_t lora_workspace_bytes(const LoraExpand&) { refuse(); }
std::size_t lora_workspace_counters_bytes() noexcept { return 0; }
void lora_forward(const LoraForward&, const Launch&) { refuse(); }
void lora_shrink(const LoraShrink&, const Launch&) { refuse(); }
void lora_expand(const LoraExpand&, const Launch&) { refuse(); }
void lora_plan(const std::int32_t*, std::int64_t, std::int64_t, std::int32_t*, void*) { refuse(); }
std::uint64_t capture_id(void*) { refuse(); }

}  // namespace toppings::cuda

namespace toppings {

std::shared_ptr<Device> cuda_device(int index) {
  fail(Status::device_failed, "cuda:" + std::to_string(index), "a build with the CUDA part",
       "one made without nvcc");
}

}  // namespace toppings
