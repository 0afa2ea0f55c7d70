// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <toppings/arena.h>
#include <toppings/slot_table.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "dlpack.h"

namespace py = pybind11;

namespace toppings::python {

namespace {

void bind_arena(py::module_& module) {
  py::class_<Arena, std::shared_ptr<Arena>>(module, "Arena")
      .def(py::init([](int num_layers, std::int64_t bytes_per_layer, const std::string& dtype,
                       std::shared_ptr<Device> device) {
             if (device == nullptr) device = host_device();
             return std::make_shared<Arena>(std::move(device), num_layers, bytes_per_layer,
                                            dtype_from_name(dtype));
           }),
           py::arg("num_layers"), py::arg("bytes_per_layer"), py::arg("dtype"),
           py::arg("device") = nullptr)
      .def_static(
          "in_place",
          [](std::shared_ptr<HostStore> store, int num_layers, const std::string& dtype) {
            return Arena::in_place(std::move(store), num_layers, dtype_from_name(dtype));
          },
          py::arg("store").none(false), py::arg("num_layers"), py::arg("dtype"))
      .def_property_readonly("num_layers", &Arena::num_layers)
      .def_property_readonly("bytes_per_layer", &Arena::bytes_per_layer)
      .def_property_readonly("is_in_place", &Arena::is_in_place)
      .def_property_readonly("device", &Arena::device)
      .def(
          "layer",
          [](std::shared_ptr<Arena> arena, int layer) {
            const std::byte* data = arena->layer(layer);
            const DType dtype = arena->dtype();
            const std::int64_t count =
                arena->bytes_per_layer() / static_cast<std::int64_t>(size_of(dtype));
            const DlDevice device = to_dl(*arena->device());
            return DlpackArray(std::move(arena), data, to_dl(dtype), {count}, device);
          },
          py::arg("layer"));
}

}  // namespace

void bind_slots(py::module_& module) {
  bind_arena(module);
  const py::object stats_type = named_tuple(
      module, "SlotTableStats", "slots resident pinned arena_bytes used_bytes evictions");
  py::class_<SlotTable, std::shared_ptr<SlotTable>>(module, "SlotTable")
      .def(py::init<std::shared_ptr<ModelShape>, std::shared_ptr<Arena>, int>(),
           py::arg("shape").none(false), py::arg("arena").none(false), py::arg("num_slots"))
      .def(
          "acquire",
          [](SlotTable& table, std::shared_ptr<Image> image) {
            const SlotTable::Acquired acquired = table.acquire(std::move(image));
            return std::pair{acquired.slot, acquired.resident};
          },
          py::arg("image").none(false), release_gil())
      .def("can_acquire", &SlotTable::can_acquire, py::arg("image"))
      .def("release", &SlotTable::release, py::arg("slot"), release_gil())
      .def("find", &SlotTable::find, py::arg("digest"))
      .def("is_published", &SlotTable::is_published, py::arg("slot"), py::arg("layer"))
      .def("slots",
           [](std::shared_ptr<SlotTable> table) {
             const std::int64_t* data = table->device_slots();
             std::vector<std::int64_t> shape{table->num_rows(), table->num_slots(), 3};
             const DlDevice device = to_dl(*table->arena()->device());
             return DlpackArray(std::move(table), data, kDlInt64, std::move(shape), device);
           })
      .def("scales",
           [](std::shared_ptr<SlotTable> table) {
             const float* data = table->device_scales();
             std::vector<std::int64_t> shape{table->num_rows(), table->num_slots()};
             const DlDevice device = to_dl(*table->arena()->device());
             return DlpackArray(std::move(table), data, kDlFloat32, std::move(shape), device);
           })
      .def(
          "upload",
          [](SlotTable& table, std::uintptr_t stream) {
            table.upload(*table.arena()->device()->wrap_stream(reinterpret_cast<void*>(stream)));
          },
          py::arg("stream") = 0, release_gil())
      .def("stats", [stats_type](const SlotTable& table) {
        const SlotTable::Stats stats = table.stats();
        return stats_type(stats.slots, stats.resident, stats.pinned, stats.arena_bytes,
                          stats.used_bytes, stats.evictions);
      });
}

}  // namespace toppings::python
