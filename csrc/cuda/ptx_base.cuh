// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#define TOPPINGS_DEVICE __device__ __forceinline__
#define TOPPINGS_KERNEL __global__ void
#define TOPPINGS_LAUNCH_BOUNDS(...) __launch_bounds__(__VA_ARGS__)
#define TOPPINGS_GRID_CONSTANT __grid_constant__
#define TOPPINGS_CUDA_UNROLL _Pragma("unroll")
#define TOPPINGS_CUDA_ROLLED _Pragma("unroll 1")
// A last parameter that tells the simulator where the call stands; nothing on a GPU.
#define TOPPINGS_SITE
#define TOPPINGS_AND_SITE
#define TOPPINGS_PASS_SITE
#else
#include "cuda/simulator.h"
#define TOPPINGS_DEVICE inline
#define TOPPINGS_KERNEL inline void
#define TOPPINGS_LAUNCH_BOUNDS(...)
#define TOPPINGS_GRID_CONSTANT
#define TOPPINGS_CUDA_UNROLL
#define TOPPINGS_CUDA_ROLLED
#define TOPPINGS_SITE \
  ::toppings::cuda::simulator::Site site = ::toppings::cuda::simulator::Site::current()
#define TOPPINGS_AND_SITE , TOPPINGS_SITE
#define TOPPINGS_PASS_SITE , site
#endif

namespace toppings::cuda {

struct Index3 {
  unsigned x, y, z;
};

TOPPINGS_DEVICE Index3 thread_index() {
#ifdef __CUDACC__
  return {threadIdx.x, threadIdx.y, threadIdx.z};
#else
  const simulator::Index& i = simulator::current->thread;
  return {i.x, i.y, i.z};
#endif
}

TOPPINGS_DEVICE Index3 block_index() {
#ifdef __CUDACC__
  return {blockIdx.x, blockIdx.y, blockIdx.z};
#else
  const simulator::Index& i = simulator::current->block;
  return {i.x, i.y, i.z};
#endif
}

TOPPINGS_DEVICE Index3 block_size() {
#ifdef __CUDACC__
  return {blockDim.x, blockDim.y, blockDim.z};
#else
  const simulator::Index& i = simulator::current->block_size;
  return {i.x, i.y, i.z};
#endif
}

TOPPINGS_DEVICE Index3 grid_size() {
#ifdef __CUDACC__
  return {gridDim.x, gridDim.y, gridDim.z};
#else
  const simulator::Index& i = simulator::current->grid_size;
  return {i.x, i.y, i.z};
#endif
}

inline constexpr unsigned kWarpSize = 32;

TOPPINGS_DEVICE unsigned lane() {
#ifdef __CUDACC__
  return threadIdx.x % kWarpSize;  // %laneid is opaque to the compiler
#else
  return simulator::current->lane;
#endif
}

// The warp's number in its block.
TOPPINGS_DEVICE unsigned warp() {
#ifdef __CUDACC__
  return ((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x) / kWarpSize;
#else
  return simulator::current->warp;
#endif
}

// The same value, hidden from the compiler: what is computed from it stays where it is used,
// instead of in registers throughout the kernel.
TOPPINGS_DEVICE unsigned opaque(unsigned value) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// The block's shared memory: LaunchConfig::shared_bytes on a multiple of 128 bytes, uninitialized.
TOPPINGS_DEVICE std::byte* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ __align__(128) std::byte toppings_dynamic_shared[];
  return toppings_dynamic_shared;
#else
  return simulator::current->shared;
#endif
}

// griddepcontrol.wait: the previous kernel of the stream has ended and its writes are visible. What
// it wrote must be read by load_global_coherent: the other loads promise read-only data, and the
// compiler may move them up.
TOPPINGS_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
  simulator::wait_for_previous_kernel();
#endif
}

// griddepcontrol.launch_dependents
TOPPINGS_DEVICE void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

template <class To, class From>
TOPPINGS_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace toppings::cuda
