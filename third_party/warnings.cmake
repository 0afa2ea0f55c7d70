# SPDX-License-Identifier: Apache-2.0
# The project's own C++ is warning-free; third-party headers are included as SYSTEM.
add_library(toppings_warnings INTERFACE)
target_compile_options(toppings_warnings INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Werror>)
