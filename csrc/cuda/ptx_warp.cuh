// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/ptx_base.cuh"

// Barriers, shuffles and votes, always of the whole warp or block. Only the barriers order memory:
// what a lane wrote before a shuffle isn't visible to others after it.
namespace toppings::cuda {

// Calls between them are qualified: the site would bring in std::shuffle.
inline constexpr std::uint32_t kAllLanes = 0xffffffffu;

TOPPINGS_DEVICE void sync_block(TOPPINGS_SITE) {
#ifdef __CUDACC__
  __syncthreads();
#else
  simulator::sync_block(site);
#endif
}

TOPPINGS_DEVICE void sync_warp(TOPPINGS_SITE) {
#ifdef __CUDACC__
  __syncwarp();
#else
  simulator::sync_warp(site);
#endif
}

// The value of the given lane (taken modulo 32), for values of 4 or 8 bytes.
template <class T>
TOPPINGS_DEVICE T shuffle(T value, unsigned source_lane TOPPINGS_AND_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  struct Words {
    std::uint32_t w[sizeof(T) / 4];
  };
  Words words = bit_cast<Words>(value);
  TOPPINGS_CUDA_UNROLL
  for (std::uint32_t& word : words.w) {
#ifdef __CUDACC__
    word = __shfl_sync(kAllLanes, word, source_lane);
#else
    word = simulator::shuffle(word, source_lane % kWarpSize, site);
#endif
  }
  return bit_cast<T>(words);
}

template <class T>
TOPPINGS_DEVICE T shuffle_xor(T value, unsigned mask TOPPINGS_AND_SITE) {
  return toppings::cuda::shuffle(value, lane() ^ mask TOPPINGS_PASS_SITE);
}

// The value of the lane `delta` higher; a lane's own beyond the last one.
template <class T>
TOPPINGS_DEVICE T shuffle_down(T value, unsigned delta TOPPINGS_AND_SITE) {
  const unsigned source = lane() + delta;
  return toppings::cuda::shuffle(value, source < kWarpSize ? source : lane() TOPPINGS_PASS_SITE);
}

// The value of the lane `delta` lower; a lane's own below the first one.
template <class T>
TOPPINGS_DEVICE T shuffle_up(T value, unsigned delta TOPPINGS_AND_SITE) {
  return toppings::cuda::shuffle(value,
                                 delta <= lane() ? lane() - delta : lane() TOPPINGS_PASS_SITE);
}

// Bit i is lane i's.
TOPPINGS_DEVICE std::uint32_t ballot(bool bit TOPPINGS_AND_SITE) {
#ifdef __CUDACC__
  return __ballot_sync(kAllLanes, bit);
#else
  return simulator::ballot(bit, site);
#endif
}

TOPPINGS_DEVICE bool any(bool bit TOPPINGS_AND_SITE) {
#ifdef __CUDACC__
  return __any_sync(kAllLanes, bit) != 0;
#else
  return simulator::ballot(bit, site) != 0;
#endif
}

TOPPINGS_DEVICE bool all(bool bit TOPPINGS_AND_SITE) {
#ifdef __CUDACC__
  return __all_sync(kAllLanes, bit) != 0;
#else
  return simulator::ballot(bit, site) == kAllLanes;
#endif
}

TOPPINGS_DEVICE int count_bits(std::uint32_t bits) {
#ifdef __CUDACC__
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// The number of the lowest set bit; -1 when there is none.
TOPPINGS_DEVICE int lowest_bit(std::uint32_t bits) {
#ifdef __CUDACC__
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ffs(static_cast<int>(bits)) - 1;
#endif
}

}  // namespace toppings::cuda
