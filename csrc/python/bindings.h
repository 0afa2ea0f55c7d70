// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace toppings::python {

// For calls that move bytes or wait for one that does.
using release_gil = pybind11::call_guard<pybind11::gil_scoped_release>;

// A collections.namedtuple class, added to the module. fields: separated by spaces.
pybind11::object named_tuple(pybind11::module_& module, const char* name, const char* fields);

void bind_device(pybind11::module_& module);  // Device
void bind_store(pybind11::module_& module);   // Image, ImageBuilder, HostStore
void bind_image_files(pybind11::module_& module);
void bind_slots(pybind11::module_& module);   // Arena, SlotTable
void bind_loader(pybind11::module_& module);  // Ticket, Loader

}  // namespace toppings::python
