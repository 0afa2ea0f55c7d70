// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/error.h>

#include <cstdint>
#include <string>

// Errors in the one form all of them have: "what: expected X, got Y".
namespace toppings {

[[noreturn]] inline void fail(Status status, const std::string& what, const std::string& expected,
                              const std::string& got) {
  throw Error(status, what + ": expected " + expected + ", got " + got);
}

inline void check_index(const char* what, std::int64_t index, std::int64_t count) {
  if (index >= 0 && index < count) return;
  fail(Status::invalid_argument, what, "0 <= index < " + std::to_string(count),
       std::to_string(index));
}

inline void check_positive(const char* what, std::int64_t value) {
  if (value >= 1) return;
  fail(Status::invalid_argument, what, "at least 1", std::to_string(value));
}

}  // namespace toppings
