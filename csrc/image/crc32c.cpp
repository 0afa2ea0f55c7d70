// SPDX-License-Identifier: Apache-2.0
#include "image/crc32c.h"

#include <nmmintrin.h>

#include <array>
#include <cstring>

namespace toppings {
namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78;  // x^32 + x^28 + ..., bits reflected

using Table = std::array<std::uint32_t, 256>;

// What a register becomes, bit by bit: appending bytes is linear over GF(2).
using Operator = std::array<std::uint32_t, 32>;

constexpr std::uint32_t apply(const Operator& op, std::uint32_t crc) {
  std::uint32_t result = 0;
  for (std::size_t bit = 0; bit < 32; ++bit) {
    if ((crc >> bit & 1) != 0) result ^= op[bit];
  }
  return result;
}

// Appends 2^log_bytes zero bytes.
constexpr Operator append_zeros(int log_bytes) {
  Operator op{};
  for (std::size_t bit = 0; bit < 32; ++bit) {
    std::uint32_t crc = std::uint32_t{1} << bit;
    for (int i = 0; i < 8; ++i) crc = crc >> 1 ^ (kPolynomial & (0 - (crc & 1)));
    op[bit] = crc;
  }
  for (int i = 0; i < log_bytes; ++i) {
    Operator twice{};
    for (std::size_t bit = 0; bit < 32; ++bit) twice[bit] = apply(op, op[bit]);
    op = twice;
  }
  return op;
}

// tables[i][b]: the operator applied to byte b at position i of the register.
constexpr std::array<Table, 4> tables_of(const Operator& op) {
  std::array<Table, 4> tables{};
  for (std::size_t i = 0; i < 4; ++i) {
    for (std::uint32_t byte = 0; byte < 256; ++byte) tables[i][byte] = apply(op, byte << 8 * i);
  }
  return tables;
}

constexpr std::uint32_t apply(const std::array<Table, 4>& tables, std::uint32_t crc) {
  return tables[0][crc & 0xFF] ^ tables[1][crc >> 8 & 0xFF] ^ tables[2][crc >> 16 & 0xFF] ^
         tables[3][crc >> 24];
}

// kAfter[i][b]: the register that held only byte b, at its low end, once i + 1 zero bytes more have
// been appended (so 8 bytes at a time take 8 look-ups that don't wait for each other).
constexpr std::array<Table, 8> tables_of_bytes() {
  std::array<Table, 8> tables{};
  const Operator op = append_zeros(0);
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (Table& table : tables) table[byte] = crc = apply(op, crc);
  }
  return tables;
}

constexpr std::array<Table, 8> kAfter = tables_of_bytes();

// The instruction takes 3 cycles but one can begin in each, so three lanes are read side by side.
// Longer lanes make joining them cheaper, but leave more at the end to one lane.
constexpr int kLogLane = 10;
constexpr std::size_t kLane = std::size_t{1} << kLogLane;
constexpr std::array<Table, 4> kAppendLane = tables_of(append_zeros(kLogLane));

std::uint64_t load(const std::byte* data) noexcept {
  std::uint64_t word;
  std::memcpy(&word, data, sizeof word);
  return word;
}

__attribute__((target("sse4.2"))) std::uint32_t crc32c_sse42(std::uint32_t crc,
                                                             const std::byte* data,
                                                             std::size_t bytes) noexcept {
  std::uint64_t first = ~crc;
  for (; bytes >= 3 * kLane; data += 3 * kLane, bytes -= 3 * kLane) {
    std::uint64_t second = 0;
    std::uint64_t third = 0;
    for (std::size_t i = 0; i < kLane; i += 8) {
      first = _mm_crc32_u64(first, load(data + i));
      second = _mm_crc32_u64(second, load(data + kLane + i));
      third = _mm_crc32_u64(third, load(data + 2 * kLane + i));
    }
    const std::uint32_t both =
        apply(kAppendLane, static_cast<std::uint32_t>(first)) ^ static_cast<std::uint32_t>(second);
    first = apply(kAppendLane, both) ^ static_cast<std::uint32_t>(third);
  }
  for (; bytes >= 8; data += 8, bytes -= 8) first = _mm_crc32_u64(first, load(data));
  auto last = static_cast<std::uint32_t>(first);
  for (; bytes > 0; ++data, --bytes) last = _mm_crc32_u8(last, static_cast<std::uint8_t>(*data));
  return ~last;
}

}  // namespace

std::uint32_t crc32c_portable(std::uint32_t crc, const void* data, std::size_t bytes) noexcept {
  const auto* next = static_cast<const std::byte*>(data);
  crc = ~crc;
  for (; bytes >= 8; next += 8, bytes -= 8) {
    const std::uint64_t word = load(next) ^ crc;
    crc = 0;
    for (std::size_t i = 0; i < 8; ++i) crc ^= kAfter[7 - i][word >> 8 * i & 0xFF];
  }
  for (; bytes > 0; ++next, --bytes) {
    crc = crc >> 8 ^ kAfter[0][(crc ^ static_cast<std::uint32_t>(*next)) & 0xFF];
  }
  return ~crc;
}

std::uint32_t crc32c(std::uint32_t crc, const void* data, std::size_t bytes) noexcept {
  static const bool has_instruction = __builtin_cpu_supports("sse4.2") != 0;
  if (!has_instruction) return crc32c_portable(crc, data, bytes);
  return crc32c_sse42(crc, static_cast<const std::byte*>(data), bytes);
}

}  // namespace toppings
