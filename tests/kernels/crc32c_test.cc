#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "kernels/kv_pack.h"

namespace winnow::kernels {
namespace {

TEST(Crc32c, KnownValues) {
  // RFC 3720, B.4.
  EXPECT_EQ(Crc32c(std::string("123456789").data(), 9), 0xe3069283u);
  std::vector<uint8_t> bytes(32, 0);
  EXPECT_EQ(Crc32c(bytes.data(), 32), 0x8a9136aau);
  bytes.assign(32, 0xff);
  EXPECT_EQ(Crc32c(bytes.data(), 32), 0x62a8ab43u);
  for (size_t i = 0; i < 32; ++i) bytes[i] = static_cast<uint8_t>(i);
  EXPECT_EQ(Crc32c(bytes.data(), 32), 0x46dd794eu);
  EXPECT_EQ(Crc32c(nullptr, 0), 0u);
}

// Bit by bit, as the polynomial says.
uint32_t Slow(const std::vector<uint8_t>& bytes) {
  uint32_t crc = ~0u;
  for (const uint8_t byte : bytes) {
    crc ^= byte;
    for (int i = 0; i < 8; ++i) crc = (crc >> 1) ^ ((crc & 1u) != 0 ? 0x82f63b78u : 0u);
  }
  return ~crc;
}

TEST(Crc32c, EveryLengthAndInPieces) {
  std::mt19937 rng(1);
  std::vector<uint8_t> bytes;
  for (size_t n = 0; n < 70; ++n) {
    const uint32_t whole = Crc32c(bytes.data(), n);
    EXPECT_EQ(whole, Slow(bytes)) << n;
    const size_t cut = n / 3;
    EXPECT_EQ(Crc32c(bytes.data() + cut, n - cut, Crc32c(bytes.data(), cut)), whole) << n;
    bytes.push_back(static_cast<uint8_t>(rng()));
  }
}

}  // namespace
}  // namespace winnow::kernels
