// SPDX-License-Identifier: Apache-2.0
#include "errors.h"

#include <pybind11/pybind11.h>
#include <toppings/error.h>

#include <exception>

namespace py = pybind11;

namespace toppings::python {
namespace {

const char* class_of(Status status) {
  switch (status) {
    case Status::invalid_argument:
      return "InvalidArgumentError";
    case Status::format:
      return "AdapterFormatError";
    case Status::unsupported:
      return "UnsupportedAdapterError";
    case Status::mismatch:
      return "AdapterMismatchError";
    case Status::not_found:
      return "UnknownAdapterError";
    case Status::store_full:
      return "StoreFullError";
    case Status::slots_busy:
      return "SlotsBusyError";
    case Status::device_failed:
      return "DeviceError";
    case Status::cancelled:
      return "CancelledError";
    case Status::io:
      return "FileError";
    case Status::out_of_memory:
      break;
  }
  return nullptr;
}

void raise(const Error& error) {
  const char* name = class_of(error.status());
  if (name == nullptr) {
    PyErr_SetString(PyExc_MemoryError, error.what());
    return;
  }
  try {
    // Looked up when needed: toppings.errors is importable then, whoever imported this module.
    const py::object type = py::module_::import("toppings.errors").attr(name);
    PyErr_SetString(type.ptr(), error.what());
  } catch (py::error_already_set& missing) {
    missing.restore();
  }
}

}  // namespace

void register_errors() {
  py::register_local_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Error& error) {
      raise(error);
    }
  });
}

}  // namespace toppings::python
