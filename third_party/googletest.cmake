# SPDX-License-Identifier: Apache-2.0
# GoogleTest 1.12.1 (BSD-3-Clause), for tests/cpp and tests/cuda_sim: Debian's libgtest-dev, else the same version from upstream.
find_package(GTest 1.12 QUIET)
if(NOT GTest_FOUND)
  include(FetchContent)
  FetchContent_Declare(googletest
    URL https://github.com/google/googletest/archive/refs/tags/release-1.12.1.tar.gz
    URL_HASH SHA256=81964fe578e9bd7c94dfdb09c8e4d6e6759e19967e397dbea48d1c10e45d0df2
    DOWNLOAD_EXTRACT_TIMESTAMP OFF)
  set(INSTALL_GTEST OFF CACHE BOOL "" FORCE)
  FetchContent_MakeAvailable(googletest)
endif()
