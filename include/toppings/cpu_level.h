// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>

#include <string_view>

namespace toppings {

// Instruction-set levels of the CPU kernels, best first.
enum class CpuLevel : int { avx512_bf16 = 0, avx512 = 1, avx2 = 2, generic = 3 };

// "avx512_bf16", "avx512", "avx2", "generic"
TOPPINGS_EXPORT std::string_view name_of(CpuLevel level) noexcept;
TOPPINGS_EXPORT bool cpu_supports(CpuLevel level) noexcept;

// The level in use: the best supported one unless set.
TOPPINGS_EXPORT CpuLevel cpu_level() noexcept;

// Throws unsupported. Not while an operator runs.
TOPPINGS_EXPORT void set_cpu_level(CpuLevel level);

}  // namespace toppings
