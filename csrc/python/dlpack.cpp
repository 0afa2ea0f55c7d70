// SPDX-License-Identifier: Apache-2.0
#include "dlpack.h"

#include <toppings/error.h>

#include <cstring>
#include <optional>
#include <utility>

namespace py = pybind11;

namespace toppings::python {
namespace {

constexpr char kLegacyName[] = "dltensor";
constexpr char kVersionedName[] = "dltensor_versioned";
constexpr DlVersion kVersion{.major = 1, .minor = 0};

[[noreturn]] void fail(const std::string& what, const std::string& expected,
                       const std::string& got) {
  throw Error(Status::invalid_argument, what + ": expected " + expected + ", got " + got);
}

// One export: what the capsule points to, and what that points to. Freeing it touches no Python
// object, so a consumer may do so without the GIL.
template <class Managed>
struct Export {
  Managed managed;
  std::shared_ptr<const void> owner;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;

  static void free(Managed* managed) { delete static_cast<Export*>(managed->context); }
};

template <class Managed>
void free_unused(PyObject* capsule, const char* name) {
  if (!PyCapsule_IsValid(capsule, name)) return;  // renamed: a consumer took it
  auto* managed = static_cast<Managed*>(PyCapsule_GetPointer(capsule, name));
  managed->deleter(managed);
}

void free_unused_legacy(PyObject* capsule) { free_unused<DlManagedTensor>(capsule, kLegacyName); }

void free_unused_versioned(PyObject* capsule) {
  free_unused<DlManagedTensorVersioned>(capsule, kVersionedName);
}

template <class Managed>
py::capsule make_capsule(std::unique_ptr<Export<Managed>> made, const char* name,
                         PyCapsule_Destructor destructor) {
  PyObject* capsule = PyCapsule_New(&made->managed, name, destructor);
  if (capsule == nullptr) throw py::error_already_set();
  made.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

std::optional<DType> from_dl(DlDataType dtype) {
  if (dtype.lanes != 1) return std::nullopt;
  if (dtype.code == 2 && dtype.bits == 32) return DType::f32;
  if (dtype.code == 2 && dtype.bits == 16) return DType::f16;
  if (dtype.code == 4 && dtype.bits == 16) return DType::bf16;
  return std::nullopt;
}

std::string shape_name(const std::int64_t* shape, std::int64_t ndim) {
  std::string name = "[";
  for (std::int64_t i = 0; i < ndim; ++i) {
    name += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return name + "]";
}

bool is_contiguous(const DlTensor& tensor) {
  if (tensor.strides == nullptr) return true;
  std::int64_t stride = 1;
  for (std::int32_t i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] != 1 && tensor.strides[i] != stride) return false;
    stride *= tensor.shape[i];
  }
  return true;
}

py::capsule request(const py::object& source, const std::string& name) {
  if (!py::hasattr(source, "__dlpack__") || !py::hasattr(source, "__dlpack_device__")) {
    fail(name, "a tensor with __dlpack__", py::str(py::type::of(source)));
  }
  const auto device = source.attr("__dlpack_device__")().cast<std::pair<int, int>>();
  if (device.first != kDlCpu.type) {
    fail(name, "a CPU tensor", "one on DLPack device type " + std::to_string(device.first));
  }
  const py::object dlpack = source.attr("__dlpack__");
  try {
    return dlpack(py::arg("max_version") = py::make_tuple(kVersion.major, kVersion.minor));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
  }
  return dlpack();  // a producer older than DLPack 1.0
}

const DlTensor& tensor_of(const py::capsule& capsule, const std::string& name) {
  if (PyCapsule_IsValid(capsule.ptr(), kVersionedName)) {
    const auto* managed = static_cast<const DlManagedTensorVersioned*>(
        PyCapsule_GetPointer(capsule.ptr(), kVersionedName));
    if (managed->version.major != kVersion.major) {
      fail(name, "DLPack version 1", std::to_string(managed->version.major));
    }
    return managed->tensor;
  }
  if (PyCapsule_IsValid(capsule.ptr(), kLegacyName)) {
    return static_cast<const DlManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), kLegacyName))
        ->tensor;
  }
  fail(name, "a DLPack capsule", "another one");
}

}  // namespace

DlDevice to_dl(const Device& device) {
  if (device.kind() == DeviceKind::host) return kDlCpu;
  return {.type = 2, .id = device.index()};
}

DlDataType to_dl(DType dtype) {
  const auto bits = static_cast<std::uint8_t>(8 * size_of(dtype));
  return {
      .code = static_cast<std::uint8_t>(dtype == DType::bf16 ? 4 : 2), .bits = bits, .lanes = 1};
}

DlpackArray::DlpackArray(std::shared_ptr<const void> owner, const void* data, DlDataType dtype,
                         std::vector<std::int64_t> shape, DlDevice device)
    : owner_(std::move(owner)),
      data_(const_cast<void*>(data)),
      dtype_(dtype),
      shape_(std::move(shape)),
      device_(device) {}

py::tuple DlpackArray::dlpack_device() const { return py::make_tuple(device_.type, device_.id); }

py::capsule DlpackArray::dlpack(const py::object& stream, const py::object& max_version,
                                const py::object& dl_device, const py::object& copy) const {
  // On a GPU any stream will do: what is exported was written before, or is written by the loader,
  // whose tickets order it.
  if (!stream.is_none() && device_.type == kDlCpu.type) {
    throw py::buffer_error("stream: expected None for CPU memory");
  }
  if (!copy.is_none() && copy.cast<bool>()) {
    throw py::buffer_error("copy: expected None or False, got True");
  }
  if (!dl_device.is_none() &&
      dl_device.cast<std::pair<int, int>>() != std::pair{device_.type, device_.id}) {
    throw py::buffer_error("dl_device: expected None or the device it is on");
  }
  const auto fill = [this](auto made, DlTensor* tensor) {
    made->owner = owner_;
    made->shape = shape_;
    made->strides.resize(shape_.size());
    std::int64_t stride = 1;
    for (std::size_t i = shape_.size(); i-- > 0;) {
      made->strides[i] = stride;
      stride *= shape_[i];
    }
    made->managed.context = made;
    *tensor = {.data = data_,
               .device = device_,
               .ndim = static_cast<std::int32_t>(shape_.size()),
               .dtype = dtype_,
               .shape = made->shape.data(),
               .strides = made->strides.data(),
               .byte_offset = 0};
  };
  if (!max_version.is_none() && max_version.cast<std::pair<int, int>>().first >= 1) {
    auto made = std::make_unique<Export<DlManagedTensorVersioned>>();
    fill(made.get(), &made->managed.tensor);
    made->managed.version = kVersion;
    made->managed.flags = 0;
    made->managed.deleter = Export<DlManagedTensorVersioned>::free;
    return make_capsule(std::move(made), kVersionedName, free_unused_versioned);
  }
  auto made = std::make_unique<Export<DlManagedTensor>>();
  fill(made.get(), &made->managed.tensor);
  made->managed.deleter = Export<DlManagedTensor>::free;
  return make_capsule(std::move(made), kLegacyName, free_unused_legacy);
}

DlpackMatrix::DlpackMatrix(const py::object& source, const std::string& name, std::int64_t rows,
                           std::int64_t cols)
    : capsule_(request(source, name)) {
  const DlTensor& tensor = tensor_of(capsule_, name);
  const std::int64_t expected[] = {rows, cols};
  const bool same = tensor.ndim == 2 && tensor.shape[0] == rows && tensor.shape[1] == cols;
  if (!same) {
    fail(name, "shape " + shape_name(expected, 2), shape_name(tensor.shape, tensor.ndim));
  }
  const std::optional<DType> dtype = from_dl(tensor.dtype);
  if (!dtype) {
    fail(name, "float32, float16 or bfloat16",
         "DLPack type code " + std::to_string(tensor.dtype.code) + ", " +
             std::to_string(tensor.dtype.bits) + " bits");
  }
  if (!is_contiguous(tensor)) fail(name, "a contiguous tensor", "a strided one");
  dtype_ = *dtype;
  data_ = static_cast<const std::byte*>(tensor.data) + tensor.byte_offset;
}

}  // namespace toppings::python
