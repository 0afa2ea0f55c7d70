// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <toppings/error.h>
#include <toppings/host_store.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "bindings.h"
#include "dlpack.h"
#include "seconds.h"

namespace py = pybind11;

namespace toppings::python {
namespace {

// ImageBuilder isn't thread-safe, but Python threads may share one, and set() releases the GIL.
struct SharedBuilder {
  explicit SharedBuilder(ImageBuilder from) : layout(from.layout()), builder(std::move(from)) {}

  const AdapterLayout layout;  // a copy, which insert() doesn't take away
  std::mutex mutex;
  ImageBuilder builder;
};

// Shapes are checked here and not in the library, which sees only pointers.
void set_block(SharedBuilder& shared, int layer, int projection, const py::object& a,
               const py::object& b, float scale) {
  const AdapterLayout& layout = shared.layout;
  const std::int64_t rank = layout.block(layer, projection).rank;
  const Projection& shape = layout.shape()->layer(layer)[static_cast<std::size_t>(projection)];
  const std::string where = "layer " + std::to_string(layer) + ", '" + shape.name + "', ";
  const DlpackMatrix a_matrix(a, where + "a", rank, shape.in);
  const DlpackMatrix b_matrix(b, where + "b", shape.out, rank);
  if (a_matrix.dtype() != b_matrix.dtype()) {
    throw Error(Status::invalid_argument, where + "b: expected a's " +
                                              std::string(name_of(a_matrix.dtype())) + ", got " +
                                              std::string(name_of(b_matrix.dtype())));
  }
  const py::gil_scoped_release unlocked;
  const std::lock_guard lock(shared.mutex);
  shared.builder.set(layer, projection, a_matrix.data(), b_matrix.data(), a_matrix.dtype(), scale);
}

}  // namespace

void bind_store(py::module_& module) {
  py::class_<Image, std::shared_ptr<Image>>(module, "Image")
      .def_property_readonly("digest", &Image::digest)
      .def_property_readonly("layout", [](const Image& image) { return image.layout(); })
      .def_property_readonly("bytes", [](const Image& image) { return image.layout().bytes(); })
      .def("scale", &Image::scale, py::arg("layer"), py::arg("projection"))
      .def(
          "layer_data",
          [](std::shared_ptr<Image> image, int layer) {
            const DType dtype = image->layout().dtype();
            const std::int64_t count =
                image->layout().layer_bytes(layer) / static_cast<std::int64_t>(size_of(dtype));
            const std::byte* data = image->layer_data(layer);
            return DlpackArray(std::move(image), data, to_dl(dtype), {count});
          },
          py::arg("layer"));

  py::class_<SharedBuilder, std::shared_ptr<SharedBuilder>>(module, "ImageBuilder")
      .def("set", &set_block, py::arg("layer"), py::arg("projection"), py::arg("a"), py::arg("b"),
           py::arg("scale"));

  const py::object stats_type =
      named_tuple(module, "HostStoreStats", "budget_bytes used_bytes images evictions");
  py::class_<HostStore, std::shared_ptr<HostStore>>(module, "HostStore")
      .def(py::init([](std::int64_t budget_bytes, std::shared_ptr<Device> device) {
             if (device == nullptr) device = host_device();
             return std::make_shared<HostStore>(std::move(device), budget_bytes);
           }),
           py::arg("budget_bytes"), py::arg("device") = py::none())
      .def(
          "build",
          [](HostStore& store, const AdapterLayout& layout, std::string digest,
             double patience_seconds) {
            return std::make_shared<SharedBuilder>(
                store.build(layout, std::move(digest), nanoseconds_of(patience_seconds)));
          },
          py::arg("layout"), py::arg("digest"), py::arg("patience_seconds") = 0.0, release_gil())
      .def(
          "insert",
          [](HostStore& store, SharedBuilder& shared) {
            const std::lock_guard lock(shared.mutex);
            return std::const_pointer_cast<Image>(store.insert(std::move(shared.builder)));
          },
          py::arg("builder"), release_gil())
      .def(
          "find",
          [](HostStore& store, const std::string& digest) {
            return std::const_pointer_cast<Image>(store.find(digest));
          },
          py::arg("digest"))
      .def("erase", &HostStore::erase, py::arg("digest"), release_gil())
      .def("stats", [stats_type](const HostStore& store) {
        const HostStore::Stats stats = store.stats();
        return stats_type(stats.budget_bytes, stats.used_bytes, stats.images, stats.evictions);
      });
}

}  // namespace toppings::python
