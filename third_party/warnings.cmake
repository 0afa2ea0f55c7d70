# SPDX-License-Identifier: Apache-2.0
# The project's own C++ is warning-free; third-party headers are included as SYSTEM. Development builds make warnings errors
# (CMAKE_COMPILE_WARNING_AS_ERROR, set by setup.py); a user's newer compiler must not fail over one.
# GCC 12 sees overlaps in the inlined operator+ of its own std::string (GCC bug 105651).
add_library(toppings_warnings INTERFACE)
target_compile_options(toppings_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra>
  $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-restrict>)
