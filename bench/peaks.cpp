// SPDX-License-Identifier: Apache-2.0
// What this machine reaches: FMA and bf16 dot products from registers, reads from main memory.
// Every function returns the best of `repeats` runs, summed over `threads` OpenMP threads.

#include <immintrin.h>
#include <omp.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr double kUnsupported = std::numeric_limits<double>::quiet_NaN();

// Seconds of f(thread) on all threads, from the first one's start to the last one's end.
template <class F>
double seconds(int threads, F f) {
  double start = std::numeric_limits<double>::infinity();
  double end = 0;
#pragma omp parallel num_threads(threads) reduction(min : start) reduction(max : end)
  {
#pragma omp barrier
    start = omp_get_wtime();
    f(omp_get_thread_num());
    end = omp_get_wtime();
  }
  return end - start;
}

template <class F>
double best_rate(int threads, int repeats, double work, F f) {
  seconds(threads, f);  // wakes the team
  double best = 0;
  for (int i = 0; i < repeats; ++i) best = std::max(best, work / seconds(threads, f));
  return best / 1e9;
}

constexpr std::int64_t kLoops = 2'000'000;

// Assembly, because a compiler would hoist broadcasts or spill. 12 independent accumulators hide
// the latency of two FMAs a cycle. A broadcast memory operand, as in a kernel's inner loop, is the
// faster form on some cores, so both are tried.
#define TOPPINGS_EACH(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11)
#define TOPPINGS_ZERO(n) "vxorps %%ymm" #n ", %%ymm" #n ", %%ymm" #n "\n\t"
#define TOPPINGS_LOOP(name, op)                                                                    \
  void name(int) {                                                                                 \
    const float zero = 0;                                                                          \
    std::int64_t count = kLoops;                                                                   \
    asm volatile(TOPPINGS_EACH(TOPPINGS_ZERO) TOPPINGS_ZERO(14) TOPPINGS_ZERO(15) "1:\n\t"       \
                 TOPPINGS_EACH(op) "dec %[count]\n\t"                                            \
                 "jnz 1b\n\t"                                                                    \
                 : [count] "+r"(count)                                                           \
                 : [p] "r"(&zero)                                                                \
                 : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
                   "xmm8", "xmm9", "xmm10", "xmm11", "xmm14", "xmm15"); \
  }

#ifdef __AVX512F__
#define TOPPINGS_FMA(n) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #n "\n\t"
#define TOPPINGS_FMA_MEMORY(n) "vfmadd231ps (%[p])%{1to16%}, %%zmm15, %%zmm" #n "\n\t"
TOPPINGS_LOOP(fma_loop, TOPPINGS_FMA)
TOPPINGS_LOOP(fma_memory_loop, TOPPINGS_FMA_MEMORY)
constexpr double kFmaWork = kLoops * 12.0 * 16 * 2;
#elif defined(__FMA__)
#define TOPPINGS_FMA(n) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #n "\n\t"
TOPPINGS_LOOP(fma_loop, TOPPINGS_FMA)
constexpr double kFmaWork = kLoops * 12.0 * 8 * 2;
#endif

#ifdef __AVX512BF16__
#define TOPPINGS_DOT(n) "vdpbf16ps %%zmm14, %%zmm15, %%zmm" #n "\n\t"
#define TOPPINGS_DOT_MEMORY(n) "vdpbf16ps (%[p])%{1to16%}, %%zmm15, %%zmm" #n "\n\t"
TOPPINGS_LOOP(dot_loop, TOPPINGS_DOT)
TOPPINGS_LOOP(dot_memory_loop, TOPPINGS_DOT_MEMORY)
constexpr double kDotWork = kLoops * 12.0 * 32 * 2;
#endif

// A buffer of huge pages, each part written first by the thread that reads it.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes)
      : bytes_(bytes),
        data_(mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)) {
    if (good()) madvise(data_, bytes_, MADV_HUGEPAGE);
  }
  ~Buffer() {
    if (good()) munmap(data_, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  bool good() const { return data_ != MAP_FAILED; }
  std::uint64_t* words() const { return static_cast<std::uint64_t*>(data_); }

 private:
  std::size_t bytes_;
  void* data_;
};

// Reads `streams` equal stretches of [data, data + words) side by side.
template <int streams>
std::uint64_t read(const std::uint64_t* data, std::size_t words) {
  using Vector [[gnu::vector_size(64)]] = std::uint64_t;
  const std::size_t length = words / streams / 32 * 4;  // vectors in a stretch
  const auto* vectors = reinterpret_cast<const Vector*>(data);
  Vector sums[streams][4] = {};
  for (std::size_t i = 0; i < length; i += 4) {
#pragma GCC unroll 8
    for (int s = 0; s < streams; ++s) {
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[s][k] ^= vectors[s * length + i + k];
    }
  }
  std::uint64_t total = 0;
  for (auto& stream : sums) {
    for (Vector& sum : stream) total ^= sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
  }
  return total;
}

}  // namespace

extern "C" {

// GFLOP/s, fp32; NaN without FMA instructions.
double toppings_peak_fma([[maybe_unused]] int threads, [[maybe_unused]] int repeats) {
#ifdef __AVX512F__
  return std::max(best_rate(threads, repeats, kFmaWork * threads, fma_loop),
                  best_rate(threads, repeats, kFmaWork * threads, fma_memory_loop));
#elif defined(__FMA__)
  return best_rate(threads, repeats, kFmaWork * threads, fma_loop);
#else
  return kUnsupported;
#endif
}

// GFLOP/s of vdpbf16ps; NaN without AVX512-BF16.
double toppings_peak_bf16([[maybe_unused]] int threads, [[maybe_unused]] int repeats) {
#ifdef __AVX512BF16__
  return std::max(best_rate(threads, repeats, kDotWork * threads, dot_loop),
                  best_rate(threads, repeats, kDotWork * threads, dot_memory_loop));
#else
  return kUnsupported;
#endif
}

// GB/s; NaN if there is no memory for the buffer.
double toppings_peak_read(int threads, int repeats, std::size_t bytes) {
  const std::size_t words = bytes / sizeof(std::uint64_t) / threads / 1024 * 1024;
  const Buffer buffer(words * threads * sizeof(std::uint64_t));
  if (!buffer.good()) return kUnsupported;
  std::vector<std::uint64_t> sums(threads * 8);
  const auto part = [&](int thread) { return buffer.words() + words * thread; };
  seconds(threads, [&](int thread) { std::fill_n(part(thread), words, thread + 1); });
  const double work = static_cast<double>(words) * threads * sizeof(std::uint64_t);
  const auto one = [&](int thread) { sums[thread * 8] ^= read<1>(part(thread), words); };
  const auto four = [&](int thread) { sums[thread * 8] ^= read<4>(part(thread), words); };
  const double best =
      std::max(best_rate(threads, repeats, work, one), best_rate(threads, repeats, work, four));
  asm volatile("" : : "r"(sums.data()) : "memory");
  return best;
}

// Reads `count` stretches of memory once, in pieces dealt out evenly to the OpenMP threads.
void toppings_read(const void* const* data, const std::int64_t* bytes, std::int64_t count) {
  std::uint64_t total = 0;
#pragma omp parallel for schedule(static) reduction(^ : total)
  for (std::int64_t i = 0; i < count; ++i) {
    const auto* words = static_cast<const std::uint64_t*>(data[i]);
    total ^= read<1>(words, static_cast<std::size_t>(bytes[i]) / sizeof(std::uint64_t));
  }
  asm volatile("" : : "r"(total));
}

}  // extern "C"
