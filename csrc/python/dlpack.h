// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>
#include <toppings/device.h>
#include <toppings/dtype.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// DLPack 1.x, the in-memory protocol for exchanging tensors between Python libraries, written from
// its public specification (https://dmlc.github.io/dlpack/latest/). Names of struct members are
// ours; order, types and values are the ABI.
namespace toppings::python {

struct DlDevice {
  std::int32_t type;  // 1: CPU, 2: CUDA
  std::int32_t id;
};

struct DlDataType {
  std::uint8_t code;  // 0: int, 2: IEEE float, 4: bfloat
  std::uint8_t bits;
  std::uint16_t lanes;  // 1 unless it is a vector type
};

struct DlTensor {
  void* data;
  DlDevice device;
  std::int32_t ndim;
  DlDataType dtype;
  std::int64_t* shape;    // [ndim]
  std::int64_t* strides;  // [ndim] elements, or null: contiguous
  std::uint64_t byte_offset;
};

// What a capsule named "dltensor" points to. The consumer calls the deleter when it is done.
struct DlManagedTensor {
  DlTensor tensor;
  void* context;
  void (*deleter)(DlManagedTensor*);
};

struct DlVersion {
  std::uint32_t major;  // the ABI changes with it
  std::uint32_t minor;
};

// What a capsule named "dltensor_versioned" points to.
struct DlManagedTensorVersioned {
  DlVersion version;
  void* context;
  void (*deleter)(DlManagedTensorVersioned*);
  std::uint64_t flags;  // bit 0: read-only, bit 1: a copy was made
  DlTensor tensor;
};

inline constexpr DlDevice kDlCpu{.type = 1, .id = 0};
inline constexpr DlDataType kDlInt64{.code = 0, .bits = 64, .lanes = 1};
inline constexpr DlDataType kDlFloat32{.code = 2, .bits = 32, .lanes = 1};

DlDataType to_dl(DType dtype);
DlDevice to_dl(const Device& device);

// Export: memory of the runtime with its shape. Whatever is made of it keeps the owner alive.
class DlpackArray {
 public:
  DlpackArray(std::shared_ptr<const void> owner, const void* data, DlDataType dtype,
              std::vector<std::int64_t> shape, DlDevice device = kDlCpu);

  // The __dlpack__ method. max_version: (major, minor) the consumer understands, or None; from 1
  // on the capsule is a versioned one. Raises BufferError for what can't be had without a copy.
  pybind11::capsule dlpack(const pybind11::object& stream, const pybind11::object& max_version,
                           const pybind11::object& dl_device, const pybind11::object& copy) const;
  pybind11::tuple dlpack_device() const;

 private:
  std::shared_ptr<const void> owner_;
  void* data_;
  DlDataType dtype_;
  std::vector<std::int64_t> shape_;
  DlDevice device_;
};

// Import: a contiguous 2-D CPU tensor of one of the library's dtypes, borrowed from a Python object
// while this one lives. Made and destroyed with the GIL held.
class DlpackMatrix {
 public:
  // name: how errors call it. Throws invalid_argument for anything else than the above, and unless
  // its shape is [rows, cols].
  DlpackMatrix(const pybind11::object& source, const std::string& name, std::int64_t rows,
               std::int64_t cols);

  const void* data() const noexcept { return data_; }
  DType dtype() const noexcept { return dtype_; }

 private:
  pybind11::capsule capsule_;  // never renamed to "used_...", so that it frees the tensor itself
  const void* data_;
  DType dtype_;
};

}  // namespace toppings::python
