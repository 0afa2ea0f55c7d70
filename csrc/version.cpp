// SPDX-License-Identifier: Apache-2.0
#include <toppings/version.h>

namespace toppings {

const char* version() noexcept { return TOPPINGS_VERSION; }

int abi_version() noexcept { return TOPPINGS_ABI_VERSION; }

bool built_with_cuda() noexcept {
#ifdef TOPPINGS_WITH_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace toppings
