// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>

#include <stdexcept>
#include <string>

namespace toppings {

// Why a call failed. The numbers are stable; new reasons are added at the end.
enum class Status : int {
  invalid_argument = 1,  // an argument is out of range or of the wrong shape
  format = 2,            // foreign bytes are damaged or contradict themselves
  unsupported = 3,       // well-formed, but refused by name
  mismatch = 4,          // an adapter doesn't fit the base model
  not_found = 5,         // no such digest, slot or layer
  store_full = 6,        // the host store's budget is taken by images in use
  slots_busy = 7,        // no slot, or no large enough arena range, is idle
  out_of_memory = 8,     // the operating system refused memory
  device_failed = 9,     // the device or its driver reported a failure
  cancelled = 10,        // somebody asked for it to stop
  io = 11,               // a file can't be opened, read or written
};

// The only exception the library throws on purpose. A message reads "what: expected X, got Y".
class TOPPINGS_EXPORT Error : public std::runtime_error {
 public:
  Error(Status status, const std::string& message) : std::runtime_error(message), status_(status) {}
  Status status() const noexcept { return status_; }

 private:
  Status status_;
};

}  // namespace toppings
