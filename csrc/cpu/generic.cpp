// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd_generic.h"
// after Simd:
#include "cpu/table.h"

namespace toppings::cpu {

constinit const Kernels kGenericKernels = fp32_kernels();

}  // namespace toppings::cpu
