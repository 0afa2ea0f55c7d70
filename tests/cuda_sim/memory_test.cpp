// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "clean.h"
#include "cuda/ptx.cuh"

// The instructions of ptx.cuh against plain C++: copies, loads, stores, atomics, number formats.
namespace toppings::sim {
namespace {

using namespace cuda;

// ---- copies

template <int kBytes>
TOPPINGS_KERNEL copy_prefixes(const std::byte* x, std::byte* y) {
  std::byte* shared = dynamic_shared() + lane() * kBytes;
  copy_async<kBytes>(shared, x + lane() * kBytes, static_cast<int>(lane() % (kBytes + 1)));
  commit_copies();
  wait_copies<0>();
  for (int i = 0; i < kBytes; ++i) y[static_cast<int>(lane()) * kBytes + i] = shared[i];
}

template <int kBytes>
void test_copies() {
  alignas(16) std::byte x[32 * kBytes], y[32 * kBytes];
  for (std::size_t i = 0; i < sizeof x; ++i) x[i] = static_cast<std::byte>(i * 7 + 1);
  expect_clean(copy_prefixes<kBytes>, {.block = {32}, .shared_bytes = sizeof x}, +x, +y);
  for (std::size_t i = 0; i < sizeof x; ++i) {
    const bool valid = i % kBytes < i / kBytes % (kBytes + 1);
    EXPECT_EQ(y[i], valid ? x[i] : std::byte{0}) << i;
  }
}

TEST(Sim, CopiesFillUpWithZeros) {
  test_copies<4>();
  test_copies<8>();
  test_copies<16>();
}

// What has arrived after the wait of each step, when copies are late.
TOPPINGS_KERNEL copy_groups(const std::uint32_t* x, std::uint32_t* seen) {
  std::byte* shared = dynamic_shared();
  const unsigned t = lane();
  const auto copy = [&](unsigned i) {
    copy_async<4>(shared + (i * 32 + t) * 4, x + i * 32 + t, 4);
  };
  const auto look = [&](unsigned time) {
    for (unsigned i = 0; i < 3; ++i) {
      std::uint32_t word;
      __builtin_memcpy(&word, shared + (i * 32 + t) * 4, 4);  // a plain read: not a race
      seen[(time * 3 + i) * 32 + t] = word;
    }
  };
  copy(0);
  commit_copies();
  copy(1);
  commit_copies();
  copy(2);
  look(0);
  wait_copies<1>();
  look(1);
  wait_copies<0>();
  look(2);
  commit_copies();
  wait_copies<0>();
  look(3);
}

TEST(Sim, CopyGroups) {
  std::vector<std::uint32_t> x(96), seen(4 * 96);
  std::iota(x.begin(), x.end(), 0u);
  const LaunchConfig config{.block = {32}, .shared_bytes = 384};
  EXPECT_EQ(launch(copy_groups, config, {.copies = Copies::late}, x.data(), seen.data()).text(),
            "");
  for (unsigned time = 0; time < 4; ++time) {
    for (unsigned i = 0; i < 96; ++i) {
      EXPECT_EQ(seen[time * 96 + i], i / 32 < time ? x[i] : 0xffffffffu) << time << " " << i;
    }
  }
}

// ---- loads, stores, atomics

template <class T>
TOPPINGS_KERNEL move_words(const T* x, T* y) {
  std::byte* shared = dynamic_shared() + lane() * sizeof(T);
  store_shared(shared, load_global<T>(x + lane()));
  store_global(y + lane(), load_shared<T>(shared));
  store_shared(shared, load_global_streaming<T>(x + 32 + lane()));
  store_global(y + 32 + lane(), load_shared<T>(shared));
  store_global(y + 64 + lane(), load_global_coherent<T>(x + 64 + lane()));
}

template <class T>
void test_moves() {
  std::vector<T> x(96), y(96);
  auto* bytes = reinterpret_cast<unsigned char*>(x.data());
  for (std::size_t i = 0; i < x.size() * sizeof(T); ++i) {
    bytes[i] = static_cast<unsigned char>(i * 13);
  }
  expect_clean(move_words<T>, {.block = {32}, .shared_bytes = 32 * sizeof(T)}, x.data(), y.data());
  EXPECT_EQ(std::memcmp(x.data(), y.data(), x.size() * sizeof(T)), 0);
}

TEST(Sim, LoadsAndStores) {
  test_moves<bf16>();
  test_moves<float>();
  test_moves<Vec8>();
  test_moves<Vec16>();
}

TOPPINGS_KERNEL count_threads(std::uint32_t* counter, std::uint32_t* seen) {
  seen[atomic_add_relaxed(counter, 1u)] = 1;
  thread_fence();
  atomic_add_acq_rel(counter + 1, 2u);
}

TEST(Sim, Atomics) {
  for (const Options& options : all_schedules()) {
    std::vector<std::uint32_t> counters(2), seen(5 * 64);
    EXPECT_EQ(
        launch(count_threads, {.grid = {5}, .block = {64}}, options, counters.data(), seen.data())
            .text(),
        "");
    EXPECT_EQ(counters[0], 320u);
    EXPECT_EQ(counters[1], 640u);
    EXPECT_EQ(seen, std::vector<std::uint32_t>(320, 1));
  }
}

// ---- numbers

// The nearest value of a 16-bit format, by search over all of them; ties to the even pattern.
template <class T>
std::uint16_t nearest(float value) {
  std::uint16_t best = 0;
  double best_distance = std::numeric_limits<double>::infinity();
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const float candidate = to_float(T{static_cast<std::uint16_t>(bits)});
    if (!std::isfinite(candidate) || std::signbit(candidate) != std::signbit(value)) continue;
    const double distance = std::abs(double{candidate} - value);
    if (distance < best_distance || (distance == best_distance && bits % 2 == 0)) {
      best = static_cast<std::uint16_t>(bits);
      best_distance = distance;
    }
  }
  return best;
}

template <class T>
void test_numbers(float tie) {
  std::mt19937 random(3);
  std::vector<float> values{0.f, -0.f, 1.f, tie, -tie, std::nextafter(tie, 9.f), 6e-8f, 1e-41f};
  for (int i = 0; i < 50; ++i) {
    values.push_back(std::ldexp(static_cast<float>(random()) * 0x1p-31f - 1, i % 30 - 20));
  }
  for (const float value : values) {
    EXPECT_EQ(from_float<T>(value).bits, nearest<T>(value)) << value;
    const std::uint32_t pair = pack2<T>(value, 1.5f);
    EXPECT_EQ(pair & 0xffffu, from_float<T>(value).bits);
    EXPECT_EQ(unpack2<T>(pair).x, to_float(from_float<T>(value)));
    EXPECT_EQ(unpack2<T>(pair).y, 1.5f);
  }
  EXPECT_TRUE(std::isnan(to_float(from_float<T>(NAN))));
  EXPECT_EQ(to_float(from_float<T>(INFINITY)), INFINITY);
}

TEST(Sim, Numbers) {
  test_numbers<bf16>(1 + 0x1p-8f);
  test_numbers<f16>(1 + 0x1p-11f);
  EXPECT_EQ(to_float(from_float<f16>(65519.f)), 65504.f);
  EXPECT_EQ(to_float(from_float<f16>(65520.f)), INFINITY);
  EXPECT_EQ(multiply_add(1 + 0x1p-12f, 1 - 0x1p-12f, -1.f), -0x1p-24f);
}

}  // namespace
}  // namespace toppings::sim
