// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <toppings/export.h>

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace toppings {

enum class DType : std::uint8_t { f32 = 0, f16 = 1, bf16 = 2 };

inline constexpr std::size_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// "float32", "float16", "bfloat16": the names torch and numpy use.
TOPPINGS_EXPORT std::string_view name_of(DType dtype) noexcept;
TOPPINGS_EXPORT DType dtype_from_name(std::string_view name);

// dst[i] = src[i] in the other type, rounded to nearest even. src and dst must not overlap.
// Throws invalid_argument when a finite value would become infinite (fp32 or bf16 beyond fp16's
// 65504).
TOPPINGS_EXPORT void convert(void* dst, DType dst_dtype, const void* src, DType src_dtype,
                             std::size_t count);

}  // namespace toppings
