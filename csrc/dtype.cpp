// SPDX-License-Identifier: Apache-2.0
#include <toppings/dtype.h>

#include <cstring>
#include <string>

#include "check.h"
#include "cpu/convert.h"

namespace toppings {
namespace {

constexpr std::string_view kNames[] = {"float32", "float16", "bfloat16"};

bool is_finite(float value) { return (cpu::bits_of(value) & 0x7f800000u) != 0x7f800000u; }

template <class To, class From>
void convert_as(void* dst, const void* src, std::size_t count, DType dst_dtype) {
  To* to = static_cast<To*>(dst);
  const From* from = static_cast<const From*>(src);
  bool overflow = false;
  for (std::size_t i = 0; i < count; ++i) {
    const float value = cpu::to_float(from[i]);
    To result;
    cpu::from_float(value, result);
    overflow |= is_finite(value) && !is_finite(cpu::to_float(result));
    to[i] = result;
  }
  if (!overflow) return;
  std::size_t i = 0;
  while (!is_finite(cpu::to_float(from[i])) || is_finite(cpu::to_float(to[i]))) ++i;
  fail(Status::invalid_argument, "element " + std::to_string(i),
       "a value in the range of " + std::string(name_of(dst_dtype)),
       std::to_string(cpu::to_float(from[i])));
}

template <class To>
void convert_to(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::size_t count) {
  switch (src_dtype) {
    case DType::f32:
      return convert_as<To, float>(dst, src, count, dst_dtype);
    case DType::f16:
      return convert_as<To, cpu::f16>(dst, src, count, dst_dtype);
    case DType::bf16:
      return convert_as<To, cpu::bf16>(dst, src, count, dst_dtype);
  }
}

}  // namespace

std::string_view name_of(DType dtype) noexcept { return kNames[static_cast<int>(dtype)]; }

DType dtype_from_name(std::string_view name) {
  for (int i = 0; i < 3; ++i) {
    if (name == kNames[i]) return static_cast<DType>(i);
  }
  fail(Status::invalid_argument, "dtype", "float32, float16 or bfloat16",
       "'" + std::string(name) + "'");
}

void convert(void* dst, DType dst_dtype, const void* src, DType src_dtype, std::size_t count) {
  if (count == 0) return;
  if (dst_dtype == src_dtype) {
    std::memcpy(dst, src, count * size_of(src_dtype));
    return;
  }
  switch (dst_dtype) {
    case DType::f32:
      return convert_to<float>(dst, dst_dtype, src, src_dtype, count);
    case DType::f16:
      return convert_to<cpu::f16>(dst, dst_dtype, src, src_dtype, count);
    case DType::bf16:
      return convert_to<cpu::bf16>(dst, dst_dtype, src, src_dtype, count);
  }
}

}  // namespace toppings
