// SPDX-License-Identifier: Apache-2.0
// The smallest user of an installed libtoppings: links, and catches the library's exception across
// its border.
#include <toppings/dtype.h>
#include <toppings/error.h>
#include <toppings/version.h>

#include <cstdio>

int main() {
  if (toppings::abi_version() != TOPPINGS_ABI_VERSION) return 1;
  try {
    toppings::dtype_from_name("complex64");
  } catch (const toppings::Error&) {
    std::puts(toppings::version());
    return 0;
  }
  return 2;
}
