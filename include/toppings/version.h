// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>

// The ABI number, and that of the SONAME, which is made from it. It grows when a binary built
// against older headers would break (docs/cpp.md); the library's own version is semantic and moves
// by itself.
#define TOPPINGS_ABI_VERSION 1

namespace toppings {

// "0.1.0"
TOPPINGS_EXPORT const char* version() noexcept;

// TOPPINGS_ABI_VERSION of the library that is loaded; differs from the macro when headers and
// library don't match.
TOPPINGS_EXPORT int abi_version() noexcept;

// True when the library was compiled with its CUDA part; says nothing about a GPU being present.
TOPPINGS_EXPORT bool built_with_cuda() noexcept;

}  // namespace toppings
