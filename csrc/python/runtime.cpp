// SPDX-License-Identifier: Apache-2.0
// python/toppings/_runtime.pyi describes this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <toppings/adapter_layout.h>
#include <toppings/model_shape.h>
#include <toppings/version.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "dlpack.h"
#include "errors.h"

namespace py = pybind11;

namespace toppings::python {

py::object named_tuple(py::module_& module, const char* name, const char* fields) {
  const py::object type =
      py::module_::import("collections")
          .attr("namedtuple")(name, fields, py::arg("module") = module.attr("__name__"));
  module.attr(name) = type;
  return type;
}

namespace {

void bind_shape(py::module_& module) {
  using Row = std::tuple<std::string, std::int64_t, std::int64_t>;
  py::class_<ModelShape, std::shared_ptr<ModelShape>>(module, "ModelShape")
      .def(py::init([](const std::vector<std::vector<Row>>& layers) {
             std::vector<std::vector<Projection>> shape;
             for (const std::vector<Row>& layer : layers) {
               std::vector<Projection>& projections = shape.emplace_back();
               for (const auto& [name, in, out] : layer) projections.push_back({name, in, out});
             }
             return std::make_shared<ModelShape>(std::move(shape));
           }),
           py::arg("layers"))
      .def_property_readonly("num_layers", &ModelShape::num_layers)
      .def_property_readonly("num_rows", &ModelShape::num_rows)
      .def(
          "layer",
          [](const ModelShape& shape, int layer) {
            std::vector<Row> rows;
            for (const Projection& p : shape.layer(layer)) rows.emplace_back(p.name, p.in, p.out);
            return rows;
          },
          py::arg("layer"))
      .def("row", &ModelShape::row, py::arg("layer"), py::arg("projection"));

  py::class_<AdapterLayout>(module, "AdapterLayout")
      .def(py::init([](std::shared_ptr<ModelShape> shape, const std::string& dtype,
                       const std::vector<std::vector<std::int64_t>>& ranks) {
             return AdapterLayout(std::move(shape), dtype_from_name(dtype), ranks);
           }),
           py::arg("shape").none(false), py::arg("dtype"), py::arg("ranks"))
      .def_property_readonly("bytes", &AdapterLayout::bytes)
      .def_property_readonly("max_rank", &AdapterLayout::max_rank)
      .def_property_readonly("max_layer_bytes", &AdapterLayout::max_layer_bytes)
      .def("layer_bytes", &AdapterLayout::layer_bytes, py::arg("layer"))
      .def_property_readonly("shape",
                             [](const AdapterLayout& layout) {
                               return std::const_pointer_cast<ModelShape>(layout.shape());
                             })
      .def_property_readonly(
          "dtype", [](const AdapterLayout& layout) { return std::string(name_of(layout.dtype())); })
      .def(
          "rank",
          [](const AdapterLayout& layout, int layer, int projection) {
            return layout.block(layer, projection).rank;
          },
          py::arg("layer"), py::arg("projection"));
}

}  // namespace

PYBIND11_MODULE(_runtime, module) {
  register_errors();
  py::class_<DlpackArray>(module, "DLPackArray")
      .def("__dlpack__", &DlpackArray::dlpack, py::kw_only(), py::arg("stream") = py::none(),
           py::arg("max_version") = py::none(), py::arg("dl_device") = py::none(),
           py::arg("copy") = py::none())
      .def("__dlpack_device__", &DlpackArray::dlpack_device);
  bind_shape(module);
  bind_device(module);
  bind_store(module);
  bind_image_files(module);
  bind_slots(module);
  bind_loader(module);
  module.def("version", &version);
  module.def("abi_version", &abi_version);
  module.def("built_with_cuda", &built_with_cuda);
}

}  // namespace toppings::python
