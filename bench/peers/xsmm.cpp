// SPDX-License-Identifier: Apache-2.0
// libxsmm's small GEMMs. Weights are packed once as its bf16 kernels want them, in pairs along the
// summed dimension, B in tiles of 64 columns. Both products of 32 tokens follow each other, so that
// v stays in the cache; such blocks are spread over the threads, and a single block stays on one.

#include <libxsmm.h>
#include <omp.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "native.h"

namespace {

constexpr std::int64_t kTokens = 32;
constexpr std::int64_t kColumns = 64;

struct Block {
  std::int64_t rank;
  const char* x;
  char* y;
  const char* a;
  const char* b;
  char* v;
  libxsmm_gemmfunction shrink;
  libxsmm_gemmfunction expand;
};

class Prepared {
 public:
  Prepared(const Problem& problem, const Part* parts)
      : in_(problem.width_in),
        out_(problem.width_out),
        bf16_(problem.bf16 != 0),
        size_(bf16_ ? 2 : 4) {
    if (in_ % 2 != 0 || out_ % kColumns != 0) {
      throw std::invalid_argument("widths: expected an even K and a multiple of 64 for N");
    }
    for (std::int64_t call = 0; call < problem.calls; ++call) {
      starts_.push_back(blocks_.size());
      for (std::int64_t i = 0; i < problem.parts; ++i) add(parts[call * problem.parts + i]);
    }
    starts_.push_back(blocks_.size());
  }

  void run(std::int64_t call) const {
    const std::size_t first = starts_[call];
    const std::size_t last = starts_[call + 1];
    if (last - first == 1) return run_block(blocks_[first]);
#pragma omp parallel for schedule(static)
    for (std::size_t i = first; i < last; ++i) run_block(blocks_[i]);
  }

 private:
  void run_block(const Block& block) const {
    libxsmm_gemm_param parameters{};
    const auto product = [&](libxsmm_gemmfunction kernel, const char* a, const char* b, char* c) {
      parameters.a.primary = const_cast<char*>(a);
      parameters.b.primary = const_cast<char*>(b);
      parameters.c.primary = c;
      kernel(&parameters);
    };
    product(block.shrink, block.a, block.x, block.v);
    for (std::int64_t column = 0; column < out_; column += kColumns) {
      product(block.expand, block.b + column * block.rank * size_, block.v,
              block.y + column * size_);
    }
  }

  void add(const Part& part) {
    if (part.rank % 2 != 0) throw std::invalid_argument("rank: expected an even one");
    char* a = pack_a(part);
    char* b = pack_b(part);
    for (std::int64_t first = 0; first < part.tokens; first += kTokens) {
      const std::int64_t tokens = std::min(kTokens, part.tokens - first);
      blocks_.push_back({
          .rank = part.rank,
          .x = static_cast<const char*>(part.x) + first * in_ * size_,
          .y = static_cast<char*>(part.y) + first * out_ * size_,
          .a = a,
          .b = b,
          .v = allocate(tokens * part.rank),
          .shrink = kernel({part.rank, tokens, in_}, part.rank, in_, part.rank, true),
          .expand = kernel({kColumns, tokens, part.rank}, kColumns, part.rank, out_, false),
      });
    }
  }

  struct Sizes {
    std::int64_t m, n, k;
  };

  // Column-major, so v and y are seen transposed: c [m, n] = or += a [m, k] * b [k, n].
  libxsmm_gemmfunction kernel(Sizes sizes, std::int64_t lda, std::int64_t ldb, std::int64_t ldc,
                              bool overwrite) const {
    const libxsmm_datatype type = bf16_ ? LIBXSMM_DATATYPE_BF16 : LIBXSMM_DATATYPE_F32;
    libxsmm_bitfield flags = overwrite ? LIBXSMM_GEMM_FLAG_BETA_0 : LIBXSMM_GEMM_FLAG_NONE;
    if (bf16_) flags |= LIBXSMM_GEMM_FLAG_VNNI_A;
    const libxsmm_gemm_shape shape = libxsmm_create_gemm_shape(
        sizes.m, sizes.n, sizes.k, lda, ldb, ldc, type, type, type, LIBXSMM_DATATYPE_F32);
    const libxsmm_gemmfunction found =
        libxsmm_dispatch_gemm(shape, flags, LIBXSMM_GEMM_PREFETCH_NONE);
    if (found == nullptr) throw std::runtime_error("libxsmm has no kernel for this shape");
    return found;
  }

  char* allocate(std::int64_t elements) {
    return static_cast<char*>(memory_.allocate(elements * size_));
  }

  // [r, K] as [K / pair][r][pair]; a pair is one number in float32.
  char* pack_a(const Part& part) {
    char* packed = allocate(part.rank * in_);
    const std::int64_t pair = bf16_ ? 2 : 1;
    for (std::int64_t i = 0; i < part.rank; ++i) {
      for (std::int64_t k = 0; k < in_; ++k) {
        copy(packed, (k / pair * part.rank + i) * pair + k % pair, part.a, i * in_ + k);
      }
    }
    return packed;
  }

  // [r, N] * scale as [N / 64][r / pair][64][pair].
  char* pack_b(const Part& part) {
    std::vector<float> scaled(part.rank * out_);
    const auto scale = bf16_ ? peers::scale_bf16 : peers::scale_float;
    scale(part.b, static_cast<float>(part.scale), part.rank * out_, scaled.data());
    char* packed = allocate(part.rank * out_);
    const std::int64_t pair = bf16_ ? 2 : 1;
    for (std::int64_t i = 0; i < part.rank; ++i) {
      for (std::int64_t n = 0; n < out_; ++n) {
        const std::int64_t row = n / kColumns * part.rank + i / pair * pair;
        copy(packed, row * kColumns + n % kColumns * pair + i % pair, scaled.data(), i * out_ + n);
      }
    }
    return packed;
  }

  void copy(char* to, std::int64_t at, const void* from, std::int64_t index) const {
    std::copy_n(static_cast<const char*>(from) + index * size_, size_, to + at * size_);
  }

  std::int64_t in_;
  std::int64_t out_;
  bool bf16_;
  std::int64_t size_;  // bytes of an element
  peers::HugeMemory memory_;
  std::vector<Block> blocks_;
  std::vector<std::size_t> starts_;  // of the blocks of each call
};

std::string error;

}  // namespace

extern "C" {

const char* toppings_peer_version() { return LIBXSMM_VERSION; }

void* toppings_peer_prepare(const Problem* problem, const Part* parts) {
  try {
    libxsmm_init();
    return std::make_unique<Prepared>(*problem, parts).release();
  } catch (const std::exception& exception) {
    error = exception.what();
    return nullptr;
  }
}

const char* toppings_peer_error() { return error.c_str(); }
void toppings_peer_run(void* prepared, std::int64_t call) {
  static_cast<const Prepared*>(prepared)->run(call);
}
void toppings_peer_free(void* prepared) { delete static_cast<Prepared*>(prepared); }

}  // extern "C"
