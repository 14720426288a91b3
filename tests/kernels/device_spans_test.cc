// What ValidateDeviceSpans() lets through; needs no device.
#include "kernels/cuda/device_spans.h"

#include <gtest/gtest.h>

#include <iterator>
#include <string>

namespace winnow::kernels {
namespace {

class DeviceSpansTest : public testing::Test {
 protected:
  DeviceSpans Good() {
    auto* ints = reinterpret_cast<int32_t*>(memory_);
    return {.head_dim = 64,
            .window = 4,
            .num_layers = 2,
            .max_sequences = 3,
            .num_kv_heads = 2,
            .max_survivor_pages = 8,
            .pages = memory_,
            .state = reinterpret_cast<SpanState*>(memory_),
            .survivor_pages = ints,
            .ring_pages = ints,
            .newest = memory_,
            .ring_evict = memory_};
  }
  template <typename F>
  absl::Status With(F change) {
    DeviceSpans spans = Good();
    change(spans);
    return ValidateDeviceSpans("op", spans);
  }

  alignas(16) uint8_t memory_[64] = {};
};

TEST_F(DeviceSpansTest, EveryFormatAndHeadDimPasses) {
  for (const KvFormat& format : kKvFormats) {
    for (const int dim : {64, 128, 256}) {
      EXPECT_EQ(With([&](auto& s) { s.format = format.id, s.head_dim = dim; }), absl::OkStatus());
    }
  }
}

TEST_F(DeviceSpansTest, WithoutAWindowThereIsNoRing) {
  EXPECT_EQ(With([](auto& s) { s.window = 0, s.ring_pages = nullptr, s.ring_evict = nullptr; }),
            absl::OkStatus());
}

TEST_F(DeviceSpansTest, ABadFieldIsNamed) {
  EXPECT_EQ(With([](auto& s) { s.format = static_cast<KvFormatId>(std::size(kKvFormats)); }),
            absl::InvalidArgumentError("op: format=" + std::to_string(std::size(kKvFormats))));
  EXPECT_EQ(With([](auto& s) { s.head_dim = 72; }).code(), absl::StatusCode::kUnimplemented);
  const auto refused = [&](auto change, const std::string& what) {
    const absl::Status status = With(change);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << what;
    const std::string message(status.message());
    EXPECT_TRUE(message.starts_with("op: ")) << message;
    EXPECT_NE(message.find(what), std::string::npos) << message;
  };
  refused([](auto& s) { s.window = -1; }, "window=-1");
  refused([](auto& s) { s.shift = 2; }, "shift=2");
  refused([](auto& s) { s.num_layers = 0; }, "num_layers=0");
  refused([](auto& s) { s.max_sequences = 0; }, "max_sequences=0");
  refused([](auto& s) { s.num_kv_heads = 0; }, "num_kv_heads=0");
  refused([](auto& s) { s.max_survivor_pages = 6; }, "max_survivor_pages=6");
  refused([](auto& s) { s.window = (1 << 30) + 1; }, "window=1073741825");
  refused([](auto& s) { s.max_survivor_pages = 1 << 28; }, "max_survivor_pages=268435456");
  refused(
      [](auto& s) { s.num_layers = 1 << 11, s.max_sequences = 1 << 10, s.num_kv_heads = 1 << 10; },
      "num_layers=2048");
  EXPECT_EQ(With([](auto& s) {
              s.num_layers = (1 << 11) - 1, s.max_sequences = 1 << 10, s.num_kv_heads = 1 << 10;
            }),
            absl::OkStatus());
}

TEST_F(DeviceSpansTest, NullAndMisalignedArraysAreRefused) {
  const auto code = [&](auto change) { return With(change).code(); };
  const auto invalid = absl::StatusCode::kInvalidArgument;
  EXPECT_EQ(code([](auto& s) { s.pages = nullptr; }), invalid);
  EXPECT_EQ(code([](auto& s) { s.state = nullptr; }), invalid);
  EXPECT_EQ(code([](auto& s) { s.survivor_pages = nullptr; }), invalid);
  EXPECT_EQ(code([](auto& s) { s.ring_pages = nullptr; }), invalid);
  EXPECT_EQ(code([](auto& s) { s.newest = nullptr; }), invalid);
  EXPECT_EQ(code([](auto& s) { s.ring_evict = nullptr; }), invalid);
  EXPECT_EQ(code([](auto& s) { s.pages += 8; }), invalid);
  EXPECT_EQ(code([](auto& s) { s.newest += 8; }), invalid);
  EXPECT_EQ(code([](auto& s) { s.survivor_pages += 1; }), invalid);
}

}  // namespace
}  // namespace winnow::kernels
