// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/ptx_base.cuh"
#include "cuda/ptx_number.cuh"

// ldmatrix and mma.sync, collectives of the warp. With g = lane / 4 and i = 2 (lane % 4), a word is
// the pair of columns (i, i + 1), the lower half first:
//
//   8x8 matrix M   r = M[g][i..]          transposed: r = (M[i][g], M[i + 1][g])
//   A 16x16        a[0] = A[g][i..]       a[1] = A[g + 8][i..]
//                  a[2] = A[g][i + 8..]   a[3] = A[g + 8][i + 8..]
//   B 16x8         b[0] = (B[i][g], B[i + 1][g])   b[1] = (B[i + 8][g], B[i + 9][g])
//   D 16x8         d[0] = D[g][i], d[1] = D[g][i + 1], d[2] = D[g + 8][i], d[3] = D[g + 8][i + 1]
//
// So A comes from rows [m][k] and B from rows [n][k] without transposition.
namespace toppings::cuda {
namespace detail {

template <int kMatrices, bool kTransposed>
TOPPINGS_DEVICE void load_matrix(std::uint32_t* r, const void* shared_row TOPPINGS_AND_SITE) {
#ifdef __CUDACC__
  const auto row = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared_row));
  if constexpr (kMatrices == 4 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  } else if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
  }
#else
  simulator::MatrixRow row = {};
  if (lane() < 8 * kMatrices) {
    simulator::access_shared(shared_row, 16, simulator::Access::load, site);
    __builtin_memcpy(row.words, shared_row, 16);
  }
  simulator::load_matrix(r, kMatrices, kTransposed, row, shared_row, site);
#endif
}

}  // namespace detail

// Lane 8 m + i passes the 16-byte row i of matrix m; r[m] is the lane's part of matrix m. In
// load_matrix_x2 the addresses of lanes 16 to 31 aren't used.
TOPPINGS_DEVICE void load_matrix_x4(std::uint32_t (&r)[4],
                                    const void* shared_row TOPPINGS_AND_SITE) {
  detail::load_matrix<4, false>(r, shared_row TOPPINGS_PASS_SITE);
}

TOPPINGS_DEVICE void load_matrix_x4_transposed(std::uint32_t (&r)[4],
                                               const void* shared_row TOPPINGS_AND_SITE) {
  detail::load_matrix<4, true>(r, shared_row TOPPINGS_PASS_SITE);
}

TOPPINGS_DEVICE void load_matrix_x2(std::uint32_t (&r)[2],
                                    const void* shared_row TOPPINGS_AND_SITE) {
  detail::load_matrix<2, false>(r, shared_row TOPPINGS_PASS_SITE);
}

TOPPINGS_DEVICE void load_matrix_x2_transposed(std::uint32_t (&r)[2],
                                               const void* shared_row TOPPINGS_AND_SITE) {
  detail::load_matrix<2, true>(r, shared_row TOPPINGS_PASS_SITE);
}

// d += a b in fp32. The GPU's own order and rounding of the 16 products differ from the
// simulator's.
template <class T>
TOPPINGS_DEVICE void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4],
                                 const std::uint32_t (&b)[2] TOPPINGS_AND_SITE) {
  static_assert(sizeof(T) == 2);
#ifdef __CUDACC__
  if constexpr (detail::kIsBf16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  constexpr auto type =
      detail::kIsBf16<T> ? simulator::Collective::mma_bf16 : simulator::Collective::mma_f16;
  simulator::mma_16x8x16(type, d, a, b, site);
#endif
}

}  // namespace toppings::cuda
