// SPDX-License-Identifier: Apache-2.0
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <toppings/error.h>
#include <toppings/loader.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "wait.h"

namespace py = pybind11;

namespace toppings::python {
namespace {

LoadPriority priority_from_name(const std::string& name) {
  if (name == "prefetch") return LoadPriority::prefetch;
  if (name == "normal") return LoadPriority::normal;
  if (name == "urgent") return LoadPriority::urgent;
  throw Error(Status::invalid_argument,
              "priority: expected 'prefetch', 'normal' or 'urgent', got '" + name + "'");
}

// The loader's lock may be held for as long as a driver's call takes.
template <class F>
auto without_gil(F call) {
  const py::gil_scoped_release unlocked;
  return call();
}

const char* name_of(LoadStatus status) {
  switch (status) {
    case LoadStatus::loading:
      return "loading";
    case LoadStatus::loaded:
      return "loaded";
    case LoadStatus::cancelled:
      return "cancelled";
    case LoadStatus::failed:
      break;
  }
  return "failed";
}

void bind_ticket(py::module_& module) {
  const py::object times_type = named_tuple(module, "LayerTimes", "queued transfer bytes");
  py::class_<Ticket, std::shared_ptr<Ticket>>(module, "Ticket")
      .def_property_readonly("slot", &Ticket::slot)
      .def_property_readonly("status",
                             [](const Ticket& ticket) {
                               return name_of(without_gil([&] { return ticket.status(); }));
                             })
      .def_property_readonly("num_arrived", &Ticket::num_arrived)
      .def("has_arrived", &Ticket::has_arrived, py::arg("layer"))
      .def("seconds_until", &Ticket::seconds_until, py::arg("layer"), release_gil())
      .def(
          "wait",
          [](Ticket& ticket, int layer, std::uintptr_t stream) {
            if (stream == 0) {
              wait_interruptibly(std::nullopt, [&](std::chrono::nanoseconds slice) {
                return ticket.wait_for(layer, slice);
              });
              return;
            }
            const py::gil_scoped_release unlocked;
            ticket.wait(layer, *ticket.device()->wrap_stream(reinterpret_cast<void*>(stream)));
          },
          py::arg("layer"), py::arg("stream") = 0)
      .def(
          "wait_for",
          [](Ticket& ticket, int layer, std::optional<double> seconds) {
            return wait_interruptibly(seconds, [&](std::chrono::nanoseconds slice) {
              return ticket.wait_for(layer, slice);
            });
          },
          py::arg("layer"), py::arg("timeout_seconds") = py::none())
      .def(
          "wait_for_all",
          [](Ticket& ticket, std::optional<double> seconds) {
            return wait_interruptibly(seconds, [&](std::chrono::nanoseconds slice) {
              return ticket.wait_for_all(slice);
            });
          },
          py::arg("timeout_seconds") = py::none())
      .def("cancel", &Ticket::cancel, release_gil())
      .def(
          "raise_priority",
          [](Ticket& ticket, const std::string& name) { ticket.raise(priority_from_name(name)); },
          py::arg("priority"), release_gil())
      .def("times", [times_type](const Ticket& ticket) {
        py::list times;
        const std::vector<LayerTimes> layers = without_gil([&] { return ticket.times(); });
        for (const LayerTimes& layer : layers) {
          times.append(times_type(layer.queued, layer.transfer, layer.bytes));
        }
        return times;
      });
}

}  // namespace

void bind_loader(py::module_& module) {
  bind_ticket(module);
  const py::object stats_type = named_tuple(
      module, "LoaderStats",
      "loads cancelled failed layers bytes transfer_seconds queued_seconds bytes_per_second"
      " queued_bytes");
  py::class_<Loader, std::shared_ptr<Loader>>(module, "Loader")
      .def(py::init([](std::shared_ptr<SlotTable> table, int num_streams, double window_seconds,
                       int cpu) {
             return std::shared_ptr<Loader>(
                 new Loader(
                     std::move(table),
                     {.num_streams = num_streams, .window_seconds = window_seconds, .cpu = cpu}),
                 [](Loader* loader) {
                   const py::gil_scoped_release unlocked;  // it waits for copies under way
                   delete loader;
                 });
           }),
           py::arg("table").none(false), py::arg("num_streams") = LoaderOptions{}.num_streams,
           py::arg("window_seconds") = LoaderOptions{}.window_seconds, py::arg("cpu") = -1)
      .def(
          "load",
          [](Loader& loader, int slot, const std::string& priority,
             std::optional<std::vector<int>> order) {
            const LoadPriority level = priority_from_name(priority);
            const py::gil_scoped_release unlocked;
            return std::shared_ptr<Ticket>(new Ticket(
                loader.load(slot, level, std::move(order).value_or(std::vector<int>{}))));
          },
          py::arg("slot"), py::arg("priority") = "normal", py::arg("order") = py::none())
      .def("stats", [stats_type](const Loader& loader) {
        const LoaderStats stats = without_gil([&] { return loader.stats(); });
        return stats_type(stats.loads, stats.cancelled, stats.failed, stats.layers, stats.bytes,
                          stats.transfer_seconds, stats.queued_seconds, stats.bytes_per_second,
                          stats.queued_bytes);
      });
}

}  // namespace toppings::python
