// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/ptx_base.cuh"

// Loads, stores and asynchronous copies. Every access is aligned to its own size.
namespace toppings::cuda {

struct alignas(8) Vec8 {
  std::uint32_t w[2];
};
struct alignas(16) Vec16 {
  std::uint32_t w[4];
};

namespace detail {

// The type that moves in one instruction.
template <int kBytes>
struct Word;
template <>
struct Word<1> {
  using type = std::uint8_t;
};
template <>
struct Word<2> {
  using type = std::uint16_t;
};
template <>
struct Word<4> {
  using type = std::uint32_t;
};
#ifdef __CUDACC__
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};
#else
template <>
struct Word<8> {
  using type = Vec8;
};
template <>
struct Word<16> {
  using type = Vec16;
};
#endif

template <class T>
TOPPINGS_DEVICE T load(const void* address) {
#ifdef __CUDACC__
  // Through a variable: a reference's alignment is forgotten in memcpy, and bytes would be loaded.
  const auto word = *static_cast<const typename Word<sizeof(T)>::type*>(address);
  return bit_cast<T>(word);
#else
  T value;
  __builtin_memcpy(&value, address, sizeof(T));
  return value;
#endif
}

template <class T>
TOPPINGS_DEVICE void store(void* address, const T& value) {
#ifdef __CUDACC__
  using W = typename Word<sizeof(T)>::type;
  *static_cast<W*>(address) = bit_cast<W>(value);
#else
  __builtin_memcpy(address, &value, sizeof(T));
#endif
}

}  // namespace detail

// ---- shared memory; T has 1, 2, 4, 8 or 16 bytes

template <class T>
TOPPINGS_DEVICE T load_shared(const void* address TOPPINGS_AND_SITE) {
#ifndef __CUDACC__
  simulator::access_shared(address, sizeof(T), simulator::Access::load, site);
#endif
  return detail::load<T>(address);
}

template <class T>
TOPPINGS_DEVICE void store_shared(void* address, T value TOPPINGS_AND_SITE) {
#ifndef __CUDACC__
  simulator::access_shared(address, sizeof(T), simulator::Access::store, site);
#endif
  detail::store(address, value);
}

// ---- global memory; T has 1, 2, 4, 8 or 16 bytes

// Data that anyone may write while the kernel runs: an ordinary load.
template <class T>
TOPPINGS_DEVICE T load_global_coherent(const void* address TOPPINGS_AND_SITE) {
#ifndef __CUDACC__
  simulator::access_global(address, sizeof(T), simulator::Access::load, site);
#endif
  return detail::load<T>(address);
}

// The same where the address may be of shared memory too: a generic load.
template <class T>
TOPPINGS_DEVICE T load_generic(const void* address TOPPINGS_AND_SITE) {
#ifndef __CUDACC__
  simulator::access_any(address, sizeof(T), simulator::Access::load, site);
#endif
  return detail::load<T>(address);
}

// ld.global.nc: data that nobody writes from the start of the kernel to its end.
template <class T>
TOPPINGS_DEVICE T load_global(const void* address TOPPINGS_AND_SITE) {
#ifdef __CUDACC__
  using W = typename detail::Word<sizeof(T)>::type;
  return bit_cast<T>(__ldg(static_cast<const W*>(address)));
#else
  simulator::access_global(address, sizeof(T), simulator::Access::load_constant, site);
  return detail::load<T>(address);
#endif
}

// The same for data that is used once: it doesn't displace others in L1.
template <class T>
TOPPINGS_DEVICE T load_global_streaming(const void* address TOPPINGS_AND_SITE) {
#ifdef __CUDACC__
  const std::size_t p = __cvta_generic_to_global(address);
  if constexpr (sizeof(T) == 16) {
    Vec16 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(p));
    return bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 8) {
    Vec8 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.w[0]), "=r"(v.w[1])
                 : "l"(p));
    return bit_cast<T>(v);
  } else if constexpr (sizeof(T) == 4) {
    std::uint32_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return bit_cast<T>(v);
  } else {
    static_assert(sizeof(T) == 2);
    std::uint16_t v;
    asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return bit_cast<T>(v);
  }
#else
  return load_global<T>(address, site);
#endif
}

template <class T>
TOPPINGS_DEVICE void store_global(void* address, T value TOPPINGS_AND_SITE) {
#ifndef __CUDACC__
  simulator::access_global(address, sizeof(T), simulator::Access::store, site);
#endif
  detail::store(address, value);
}

// ---- cp.async: global to shared without registers

// Bytes (4, 8 or 16) at `shared` become the first valid_bytes at `global` and zeros, once waited
// for. 16 bytes bypass L1. Nothing is read when valid_bytes is 0.
template <int Bytes>
TOPPINGS_DEVICE void copy_async(void* shared, const void* global,
                                int valid_bytes TOPPINGS_AND_SITE) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#ifdef __CUDACC__
  const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  const std::size_t from = __cvta_generic_to_global(global);
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(Bytes),
                 "r"(valid_bytes)
                 : "memory");
  }
#else
  simulator::access_copy(shared, global, Bytes, valid_bytes, site);
  simulator::Copy copy{.shared = shared, .bytes = Bytes};
  auto* to = reinterpret_cast<unsigned char*>(copy.words);
  const auto* from = static_cast<const volatile unsigned char*>(global);  // exactly these bytes
  for (int i = 0; i < valid_bytes; ++i) to[i] = from[i];
  if (simulator::issue_copy(copy, site)) {
    __builtin_memcpy(shared, copy.words, Bytes);
  } else {
    __builtin_memset(shared, 0xff, Bytes);
  }
#endif
}

// Ends a group of copies.
TOPPINGS_DEVICE void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  simulator::commit_copies();
#endif
}

// All but the newest kGroups groups of this thread have arrived: visible to the thread itself, and
// to others after a barrier.
template <int kGroups>
TOPPINGS_DEVICE void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#else
  simulator::Copy copy;
  while (simulator::next_delivery(kGroups, copy)) {
    auto* to = static_cast<std::uint32_t*>(copy.shared);
    for (int i = 0; i < copy.bytes / 4; ++i) to[i] = copy.words[i];
  }
#endif
}

}  // namespace toppings::cuda
