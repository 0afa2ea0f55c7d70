// SPDX-License-Identifier: Apache-2.0
#pragma once

// Everything a kernel does that isn't plain C++, each instruction wrapped once: a body for nvcc and
// a body for g++, which runs in tests/cuda_sim. Kernels use nothing of CUDA but these, and live in
// this namespace: CUDA has global functions named any, all and ballot.
//
// - All lanes of a warp take part in every collective, and all of them still run.
// - Shared memory is dynamic_shared() alone. Accesses through load_shared/store_shared are checked
//   and their bank conflicts counted in the simulator; plain ones are only seen by its sanitizers.
// - The same holds for global memory: sectors are counted where load_global.../store_global are
//   used.
#include "cuda/ptx_atomic.cuh"  // between blocks: atomics, fences, waiting
#include "cuda/ptx_base.cuh"    // TOPPINGS_KERNEL, TOPPINGS_DEVICE, who am I
#include "cuda/ptx_matrix.cuh"  // ldmatrix, mma
#include "cuda/ptx_memory.cuh"  // loads, stores, cp.async
#include "cuda/ptx_number.cuh"  // bf16, f16, conversions
#include "cuda/ptx_warp.cuh"    // barriers, shuffles, votes
