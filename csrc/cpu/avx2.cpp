// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd_avx2.h"
// after Simd:
#include "cpu/table.h"

namespace toppings::cpu {

constinit const Kernels kAvx2Kernels = fp32_kernels();

}  // namespace toppings::cpu
