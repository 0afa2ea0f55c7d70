// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <toppings/device.h>
#include <toppings/error.h>

#include <memory>
#include <optional>

#include "bindings.h"

namespace py = pybind11;

namespace toppings::python {
namespace {

std::shared_ptr<Device> make_host(std::optional<double> bytes_per_second, double latency_seconds,
                                  int cpu) {
  if (bytes_per_second) return host_device(HostLink{*bytes_per_second, latency_seconds, cpu});
  if (latency_seconds != 0 || cpu != -1) {
    throw Error(Status::invalid_argument,
                "bytes_per_second: expected a number where a latency or a core is given, got None");
  }
  return host_device();
}

}  // namespace

void bind_device(py::module_& module) {
  py::class_<Device, std::shared_ptr<Device>>(module, "Device")
      .def_static("host", &make_host, py::arg("bytes_per_second") = py::none(),
                  py::arg("latency_seconds") = 0.0, py::arg("cpu") = -1, release_gil())
      .def_static("cuda", &cuda_device, py::arg("index"), release_gil())
      .def_property_readonly(
          "kind",
          [](const Device& device) { return device.kind() == DeviceKind::cuda ? "cuda" : "host"; })
      .def_property_readonly("name", [](const Device& device) { return device.name(); })
      .def_property_readonly("is_in_place",
                             [](const Device& device) { return device.is_in_place(); });
}

}  // namespace toppings::python
