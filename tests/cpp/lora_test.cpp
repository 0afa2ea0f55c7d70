// SPDX-License-Identifier: Apache-2.0
#include <sys/mman.h>
#include <toppings/cpu_level.h>
#include <toppings/dtype.h>
#include <toppings/lora.h>
#include <toppings/lora_plan.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "testing.h"

namespace toppings {
namespace {

constexpr CpuLevel kLevels[] = {CpuLevel::avx512_bf16, CpuLevel::avx512, CpuLevel::avx2,
                                CpuLevel::generic};
constexpr DType kDTypes[] = {DType::f32, DType::f16, DType::bf16};

// Bytes that end where a page without access begins, so that reading or writing past them faults.
class GuardedBuffer {
 public:
  explicit GuardedBuffer(const std::vector<std::byte>& bytes) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t usable = (bytes.size() + page - 1) / page * page;
    size_ = usable + page;
    memory_ = static_cast<std::byte*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory_ + usable, page, PROT_NONE);
    data_ = memory_ + usable - bytes.size();
    if (!bytes.empty()) std::memcpy(data_, bytes.data(), bytes.size());
  }
  ~GuardedBuffer() { munmap(memory_, size_); }
  GuardedBuffer(const GuardedBuffer&) = delete;
  GuardedBuffer& operator=(const GuardedBuffer&) = delete;

  std::byte* data() const { return data_; }

 private:
  std::byte* memory_;
  std::byte* data_;
  std::size_t size_;
};

std::vector<float> as_floats(const std::byte* data, DType dtype, std::size_t count) {
  std::vector<float> values(count);
  convert(values.data(), DType::f32, data, dtype, count);
  return values;
}

// T tokens, one slot, one projection, and what y should become.
struct Problem {
  std::int64_t tokens, rank, in, width;
  DType dtype, weight_dtype;
  std::int64_t slots[3];
  float scale = 0.75F;
  std::vector<std::int32_t> token_slots;
  std::vector<std::int64_t> widths;
  std::vector<std::byte> x, y, a, b;
  std::vector<double> want;

  Problem(std::int64_t tokens, std::int64_t rank, std::int64_t in, std::int64_t width, DType dtype,
          DType weight_dtype)
      : tokens(tokens),
        rank(rank),
        in(in),
        width(width),
        dtype(dtype),
        weight_dtype(weight_dtype),
        slots{0, 0, rank},
        token_slots(static_cast<std::size_t>(tokens), 0),
        widths{width} {
    std::mt19937_64 random(static_cast<std::uint64_t>(tokens * 1000 + rank));
    const auto make = [&](std::int64_t count, DType type) {
      return testing::as_dtype(testing::random_floats(static_cast<std::size_t>(count), random),
                               type);
    };
    x = make(tokens * in, dtype);
    y = make(tokens * width, dtype);
    a = make(rank * in, weight_dtype);
    b = make(rank * width, weight_dtype);

    const auto xs = floats(x, dtype), ys = floats(y, dtype);
    const auto as = floats(a, weight_dtype), bs = floats(b, weight_dtype);
    want.assign(ys.begin(), ys.end());
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t j = 0; j < rank; ++j) {
        double v = 0;
        for (std::int64_t k = 0; k < in; ++k) v += double{xs[t * in + k]} * as[j * in + k];
        for (std::int64_t c = 0; c < width; ++c) {
          want[t * width + c] += double{scale} * v * bs[j * width + c];
        }
      }
    }
  }

  static std::vector<float> floats(const std::vector<std::byte>& bytes, DType dtype) {
    return as_floats(bytes.data(), dtype, bytes.size() / size_of(dtype));
  }

  LoraForward args() {
    return {.batch = {.tokens = tokens,
                      .num_slots = 1,
                      .num_projections = 1,
                      .slots = slots,
                      .scales = &scale,
                      .token_slots = token_slots.data()},
            .dtype = dtype,
            .a_dtype = weight_dtype,
            .b_dtype = weight_dtype,
            .in = in,
            .widths = widths,
            .x = x.data(),
            .x_stride = in,
            .y = y.data(),
            .y_stride = width,
            .a = a.data(),
            .a_size = rank * in,
            .b = b.data(),
            .b_size = rank * width};
  }
};

double relative_error(const std::vector<float>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < want.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}

class LoraTest : public ::testing::TestWithParam<CpuLevel> {
 protected:
  void SetUp() override {
    if (!cpu_supports(GetParam())) GTEST_SKIP() << "this CPU has no " << name_of(GetParam());
    before_ = cpu_level();
    set_cpu_level(GetParam());
  }
  void TearDown() override {
    if (cpu_supports(GetParam())) set_cpu_level(before_);
  }

 private:
  CpuLevel before_{};
};

INSTANTIATE_TEST_SUITE_P(Levels, LoraTest, ::testing::ValuesIn(kLevels),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST_P(LoraTest, StaysWithinItsBuffers) {
  for (const DType dtype : kDTypes) {
    for (const DType weight_dtype : kDTypes) {
      for (const std::int64_t tokens : {1, 2, 7}) {
        for (const std::int64_t rank : {1, 3, 9}) {
          for (const std::int64_t odd : {1, 15, 33, 67}) {
            Problem problem(tokens, rank, odd, odd + 12, dtype, weight_dtype);
            const GuardedBuffer x(problem.x), y(problem.y), a(problem.a), b(problem.b);
            LoraForward args = problem.args();
            args.x = x.data();
            args.y = y.data();
            args.a = a.data();
            args.b = b.data();
            lora_forward(args);
            const auto got = as_floats(y.data(), dtype, problem.want.size());
            EXPECT_LE(relative_error(got, problem.want), dtype == DType::f32 ? 1e-5 : 5e-3)
                << name_of(dtype) << ' ' << name_of(weight_dtype) << " T=" << tokens
                << " r=" << rank << " K=" << odd;
          }
        }
      }
    }
  }
}

TEST_P(LoraTest, ManyThreadsMayCallAtOnce) {
  Problem problem(40, 16, 256, 320, DType::bf16, DType::bf16);
  const std::vector<std::byte> before = problem.y;
  lora_forward(problem.args());
  std::vector<std::vector<std::byte>> results(4, before);
  std::vector<std::thread> threads;
  for (auto& result : results) {
    threads.emplace_back([&] {
      LoraForward args = problem.args();
      for (int i = 0; i < 20; ++i) {
        result = before;
        args.y = result.data();
        lora_forward(args);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& result : results) EXPECT_EQ(result, problem.y);
}

TEST(LoraErrors, AreRaisedBeforeAnythingIsWritten) {
  Problem problem(3, 2, 8, 8, DType::f32, DType::f32);
  const auto before = problem.y;
  const auto refused = [&](auto change) {
    LoraForward args = problem.args();
    change(args);
    TOPPINGS_EXPECT_ERROR(lora_forward(args), invalid_argument);
    EXPECT_EQ(problem.y, before);
  };
  refused([](LoraForward& args) { args.batch.tokens = -1; });
  refused([](LoraForward& args) { args.batch.max_rank = 1; });
  refused([](LoraForward& args) { args.a_size -= 1; });
  refused([](LoraForward& args) { args.b_size -= 1; });
  refused([](LoraForward& args) { args.in = 0; });
  refused([](LoraForward& args) { args.widths = {}; });
  refused([](LoraForward& args) { args.y_stride = 7; });
  refused([](LoraForward& args) { args.x = args.y; });
  const std::int32_t plan[] = {1, 0, 1, 2, 1, 3, -1, -1};
  refused([&](LoraForward& args) { args.batch.plan = plan; });
  problem.token_slots[2] = 1;
  refused([](LoraForward&) {});
}

TEST(LoraPlan, GroupsTokensBySlot) {
  const std::int32_t token_slots[] = {2, -1, 0, 2};
  std::vector<std::int32_t> plan(static_cast<std::size_t>(lora_plan_size(4, 3)));
  lora_plan(token_slots, 4, 3, plan.data());
  EXPECT_EQ(plan, (std::vector<std::int32_t>{2, 2, 0, 3, -1, 0, 1, 3, -1, -1}));
}

TEST(DType, NamesGoBothWays) {
  for (const DType dtype : kDTypes) EXPECT_EQ(dtype_from_name(name_of(dtype)), dtype);
  TOPPINGS_EXPECT_ERROR(dtype_from_name("float64"), invalid_argument);
}

TEST(DType, EveryFp16ValueSurvivesFp32) {
  std::vector<std::uint16_t> all(65536), back(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  for (const DType dtype : {DType::f16, DType::bf16}) {
    std::vector<float> values(all.size());
    convert(values.data(), DType::f32, all.data(), dtype, all.size());
    convert(back.data(), dtype, values.data(), DType::f32, all.size());
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (!std::isnan(values[i])) {
        EXPECT_EQ(back[i], all[i]);
      }
    }
  }
}

TEST(DType, RoundsToNearestEvenAndRefusesOverflow) {
  const auto to_f16 = [](float value) {
    std::uint16_t result;
    convert(&result, DType::f16, &value, DType::f32, 1);
    return result;
  };
  EXPECT_EQ(to_f16(1 + 0x1p-11F), 0x3c00);  // a tie
  EXPECT_EQ(to_f16(1 + 3 * 0x1p-11F), 0x3c02);
  EXPECT_EQ(to_f16(0x1p-25F), 0);  // half the smallest subnormal
  EXPECT_EQ(to_f16(0x1.8p-25F), 1);
  EXPECT_EQ(to_f16(65519.996F), 0x7bff);
  EXPECT_EQ(to_f16(-std::numeric_limits<float>::infinity()), 0xfc00);
  TOPPINGS_EXPECT_ERROR(to_f16(65520), invalid_argument);
  const float largest = std::numeric_limits<float>::max();
  std::uint16_t result;
  TOPPINGS_EXPECT_ERROR(convert(&result, DType::bf16, &largest, DType::f32, 1), invalid_argument);
}

TEST(CpuLevels, AnUnsupportedOneIsRefused) {
  EXPECT_TRUE(cpu_supports(cpu_level()));
  for (const CpuLevel level : kLevels) {
    if (!cpu_supports(level)) {
      TOPPINGS_EXPECT_ERROR(set_cpu_level(level), unsupported);
    }
  }
}

}  // namespace
}  // namespace toppings
