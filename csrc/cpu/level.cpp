// SPDX-License-Identifier: Apache-2.0
#include <toppings/cpu_level.h>

#include <algorithm>
#include <atomic>
#include <string>

#include "check.h"
#include "cpu/kernels.h"

namespace toppings {
namespace {

struct Level {
  std::string_view name;
  const cpu::Kernels* kernels;
};

constexpr int kNumLevels = 4;

// In the order of CpuLevel.
constexpr Level kLevels[kNumLevels] = {
    {"avx512_bf16", &cpu::kAvx512Bf16Kernels},
    {"avx512", &cpu::kAvx512Kernels},
    {"avx2", &cpu::kAvx2Kernels},
    {"generic", &cpu::kGenericKernels},
};

CpuLevel best_level() noexcept {
  int level = 0;
  while (!cpu_supports(static_cast<CpuLevel>(level))) ++level;  // generic is always supported
  return static_cast<CpuLevel>(level);
}

std::atomic<int>& current_level() noexcept {
  static std::atomic<int> level{static_cast<int>(best_level())};
  return level;
}

}  // namespace

std::string_view name_of(CpuLevel level) noexcept { return kLevels[static_cast<int>(level)].name; }

bool cpu_supports(CpuLevel level) noexcept {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  switch (level) {
    case CpuLevel::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case CpuLevel::avx512:
      return avx512;
    case CpuLevel::avx2:
      return avx2;
    case CpuLevel::generic:
      return true;
  }
  return false;
}

CpuLevel cpu_level() noexcept {
  return static_cast<CpuLevel>(current_level().load(std::memory_order_relaxed));
}

void set_cpu_level(CpuLevel level) {
  if (!cpu_supports(level)) {
    fail(Status::unsupported, "cpu level", "one that this CPU supports",
         std::string(name_of(level)));
  }
  current_level().store(static_cast<int>(level), std::memory_order_relaxed);
}

namespace cpu {

std::size_t scratch_bytes(std::int64_t tokens, std::int64_t ranks) {
  // At most one 32-bit unit for each rank row, also where it holds two bf16 numbers.
  const std::int64_t v = tokens * (std::int64_t{sizeof(void*)} + ranks * 4);
  const std::int64_t panel = ranks * kPanelColumns * 4;
  const std::int64_t partial = kPartialFloats * 4;
  const std::int64_t lines = 2 * kScratchAlignment;  // each part begins on one
  return static_cast<std::size_t>(v + std::max(panel, partial) + lines);
}

const Kernels& kernels() { return *kLevels[static_cast<int>(cpu_level())].kernels; }

}  // namespace cpu
}  // namespace toppings
