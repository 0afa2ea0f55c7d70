// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/ptx_base.cuh"

#ifndef __CUDACC__
#include <atomic>
#endif

// Communication between blocks, at the scope of the GPU.
namespace toppings::cuda {

// The old value. What this thread wrote before, and what others wrote before a barrier that it
// passed, is visible to whoever reads the new value with acquire.
TOPPINGS_DEVICE std::uint32_t atomic_add_acq_rel(std::uint32_t* address,
                                                 std::uint32_t value TOPPINGS_AND_SITE) {
#ifdef __CUDACC__
  std::uint32_t old;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(address)), "r"(value)
               : "memory");
  return old;
#else
  simulator::scheduling_point(site);
  simulator::access_global(address, 4, simulator::Access::atomic, site);
  return std::atomic_ref(*address).fetch_add(value, std::memory_order_acq_rel);
#endif
}

TOPPINGS_DEVICE std::uint32_t atomic_add_relaxed(std::uint32_t* address,
                                                 std::uint32_t value TOPPINGS_AND_SITE) {
#ifdef __CUDACC__
  std::uint32_t old;
  asm volatile("atom.add.relaxed.gpu.global.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(__cvta_generic_to_global(address)), "r"(value)
               : "memory");
  return old;
#else
  simulator::scheduling_point(site);
  simulator::access_global(address, 4, simulator::Access::atomic, site);
  return std::atomic_ref(*address).fetch_add(value, std::memory_order_relaxed);
#endif
}

TOPPINGS_DEVICE std::uint32_t load_acquire(const std::uint32_t* address TOPPINGS_AND_SITE) {
#ifdef __CUDACC__
  std::uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(address))
               : "memory");
  return value;
#else
  simulator::scheduling_point(site);
  simulator::access_global(address, 4, simulator::Access::atomic, site);
  return std::atomic_ref(*const_cast<std::uint32_t*>(address)).load(std::memory_order_acquire);
#endif
}

TOPPINGS_DEVICE void store_release(std::uint32_t* address, std::uint32_t value TOPPINGS_AND_SITE) {
#ifdef __CUDACC__
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)),
               "r"(value)
               : "memory");
#else
  simulator::scheduling_point(site);
  simulator::access_global(address, 4, simulator::Access::atomic, site);
  std::atomic_ref(*address).store(value, std::memory_order_release);
#endif
}

// fence.acq_rel.gpu. ThreadSanitizer doesn't know fences: let the release and acquire be in the
// atomics.
TOPPINGS_DEVICE void thread_fence(TOPPINGS_SITE) {
#ifdef __CUDACC__
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#else
  simulator::scheduling_point(site);
#endif
}

// In every loop that waits for another block.
TOPPINGS_DEVICE void yield_while_waiting(TOPPINGS_SITE) {
#ifdef __CUDACC__
  __nanosleep(20);
#else
  simulator::wait_for_others(site);
#endif
}

}  // namespace toppings::cuda
