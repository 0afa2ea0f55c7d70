// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>
#include <toppings/lora_args.h>

#include <cstddef>
#include <cstdint>

// The operators of lora.h on the memory of the current CUDA device, enqueued on a stream; nothing
// waits for the GPU. Sizes, strides and dtypes are checked, but not what lies on the device:
// token_slots outside [-1, L) count as -1; a rank above max_rank, an offset outside of a or b, or a
// plan of other token_slots is the caller's error, and undefined.
//
// v = x A^T is kept to fp32 accuracy. Deterministic: a row's bits depend on the row, its adapter,
// the dtypes and the GPU's architecture alone. fp32 is multiplied as such, without TF32. 16-bit
// weights with an infinity may give NaN instead.
namespace toppings::cuda {

// Is the CUDA part in this build? If not, everything below throws unsupported.
TOPPINGS_EXPORT bool is_built() noexcept;

struct Launch {
  void* stream = nullptr;  // cudaStream_t
  // Device memory on 256 bytes. Before its first use the first lora_workspace_counters_bytes() must
  // be zero, and every call leaves them so; the rest may hold anything. It is used by one stream at
  // a time and by nothing else, and by one host thread at a time, for the kernels that a call
  // enqueues hand it on to each other. May be null for as many bytes as 0.
  void* workspace = nullptr;
  std::size_t workspace_bytes = 0;
};

// The workspace a call needs; it grows with T and max_rank. It may be larger.
TOPPINGS_EXPORT std::size_t lora_workspace_bytes(const LoraForward& args);
TOPPINGS_EXPORT std::size_t lora_workspace_bytes(const LoraShrink& args);
TOPPINGS_EXPORT std::size_t lora_workspace_bytes(const LoraExpand& args);

// The part of a workspace, at its begin, that must be zero before its first use: one size for all.
TOPPINGS_EXPORT std::size_t lora_workspace_counters_bytes() noexcept;

// They throw invalid_argument before anything is enqueued.
TOPPINGS_EXPORT void lora_forward(const LoraForward& args, const Launch& launch);
TOPPINGS_EXPORT void lora_shrink(const LoraShrink& args, const Launch& launch);
TOPPINGS_EXPORT void lora_expand(const LoraExpand& args, const Launch& launch);

// The same numbers as lora_plan on the CPU, but for token_slots outside [-1, L).
TOPPINGS_EXPORT void lora_plan(const std::int32_t* token_slots, std::int64_t tokens,
                               std::int64_t num_slots, std::int32_t* plan, void* stream);

// The number of the graph capture the stream is part of; 0: none.
TOPPINGS_EXPORT std::uint64_t capture_id(void* stream);

}  // namespace toppings::cuda
