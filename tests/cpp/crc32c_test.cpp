// SPDX-License-Identifier: Apache-2.0
#include "image/crc32c.h"

#include <gtest/gtest.h>

#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace toppings {
namespace {

// Bit by bit, as the polynomial is defined.
std::uint32_t reference(std::uint32_t crc, const unsigned char* data, std::size_t bytes) {
  crc = ~crc;
  for (std::size_t i = 0; i < bytes; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ ((crc & 1) != 0 ? 0x82F63B78U : 0U);
  }
  return ~crc;
}

using Crc = std::uint32_t (*)(std::uint32_t, const void*, std::size_t) noexcept;

class Crc32c : public ::testing::TestWithParam<Crc> {};
INSTANTIATE_TEST_SUITE_P(Both, Crc32c, ::testing::Values(&crc32c, &crc32c_portable));

// The values of RFC 3720, appendix B.4, and the usual check value.
TEST_P(Crc32c, GivesPublishedValues) {
  const Crc crc = GetParam();
  const std::string digits = "123456789";
  EXPECT_EQ(crc(0, digits.data(), digits.size()), 0xE3069283U);
  std::vector<unsigned char> bytes(32, 0);
  EXPECT_EQ(crc(0, bytes.data(), 32), 0x8A9136AAU);
  bytes.assign(32, 0xFF);
  EXPECT_EQ(crc(0, bytes.data(), 32), 0x62A8AB43U);
  std::iota(bytes.begin(), bytes.end(), static_cast<unsigned char>(0));
  EXPECT_EQ(crc(0, bytes.data(), 32), 0x46DD794EU);
  std::iota(bytes.rbegin(), bytes.rend(), static_cast<unsigned char>(0));
  EXPECT_EQ(crc(0, bytes.data(), 32), 0x113FDB5CU);
  EXPECT_EQ(crc(7, nullptr, 0), 7U);
}

TEST_P(Crc32c, AgreesWithItsDefinitionAtAnyLengthPlaceAndCut) {
  const Crc crc = GetParam();
  std::mt19937 random(3);
  std::vector<unsigned char> bytes(20'000);
  for (unsigned char& byte : bytes) byte = static_cast<unsigned char>(random());
  for (int i = 0; i < 400; ++i) {
    const std::size_t offset = random() % 64;
    const std::size_t length = i < 200 ? static_cast<std::size_t>(i) : random() % 19'000;
    const unsigned char* data = bytes.data() + offset;
    const std::uint32_t expected = reference(0, data, length);
    ASSERT_EQ(crc(0, data, length), expected) << offset << " " << length;
    const std::size_t cut = random() % (length + 1);
    ASSERT_EQ(crc(crc(0, data, cut), data + cut, length - cut), expected) << length << " " << cut;
  }
}

}  // namespace
}  // namespace toppings
