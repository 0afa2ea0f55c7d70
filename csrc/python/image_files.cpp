// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <toppings/image_file.h>
#include <toppings/image_reader.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "bindings.h"
#include "seconds.h"
#include "wait.h"

namespace py = pybind11;

namespace toppings::python {

void bind_image_files(py::module_& module) {
  module.def("write_image", &write_image, py::arg("image"), py::arg("path"), release_gil());

  const py::object header_type = named_tuple(module, "ImageFileHeader", "digest layout scales");
  module.def(
      "read_image_header",
      [header_type](const std::string& path) {
        std::optional<ImageFileHeader> header;
        {
          const py::gil_scoped_release unlocked;
          header = read_image_header(path);
        }
        return header_type(std::move(header->digest), std::move(header->layout),
                           std::move(header->scales));
      },
      py::arg("path"));

  py::class_<ReadTicket, std::shared_ptr<ReadTicket>>(module, "ImageRead")
      .def_property_readonly("bytes_read", &ReadTicket::bytes_read)
      .def_property_readonly("bytes_total", &ReadTicket::bytes_total)
      .def_property_readonly("done", &ReadTicket::is_done)
      .def(
          "wait",
          [](ReadTicket& ticket, std::optional<double> seconds) {
            std::shared_ptr<const Image> image;
            wait_interruptibly(seconds, [&](std::chrono::nanoseconds slice) {
              image = ticket.wait_for(slice);
              return image != nullptr;
            });
            return std::const_pointer_cast<Image>(image);
          },
          py::arg("timeout_seconds") = py::none())
      .def("cancel", &ReadTicket::cancel);

  py::class_<ImageReader, std::shared_ptr<ImageReader>>(module, "ImageReader")
      .def(py::init([](std::shared_ptr<HostStore> store, int parallel_reads) {
             return std::make_shared<ImageReader>(std::move(store), parallel_reads);
           }),
           py::arg("store").none(false), py::arg("parallel_reads") = 2)
      .def(
          "read",
          [](ImageReader& reader, std::string path, std::shared_ptr<ModelShape> shape,
             double patience_seconds) {
            return reader.read(std::move(path), std::move(shape), nanoseconds_of(patience_seconds));
          },
          py::arg("path"), py::arg("shape") = py::none(), py::arg("patience_seconds") = 0.0,
          py::keep_alive<0, 1>(), release_gil());  // a reader that is gone would cancel its reads
}

}  // namespace toppings::python
