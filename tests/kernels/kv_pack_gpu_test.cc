// Packing on the device against kv_pack.h's on the CPU: the same bytes both ways, and the same
// checksums.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <ostream>
#include <random>
#include <vector>

#include "kernels/cuda/crc32c.h"
#include "kernels/cuda/kv_pack.h"
#include "kernels/kv_pack.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/device_span_case.h"

namespace winnow::kernels {
namespace {

using Bytes = std::vector<uint8_t>;

bool Same(const std::vector<ByteRange>& a, const std::vector<ByteRange>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    return x.offset == y.offset && x.bytes == y.bytes;
  });
}

class PackGpu : public testing::Test {
 protected:
  void SetUp() override { RequireGpu(); }
};

TEST_F(PackGpu, Crc32cOfAnyRange) {
  std::mt19937 rng(1);
  constexpr int64_t kPart = 65536;
  const std::vector<int64_t> sizes = {0,        1,    2,         3,     4,         5,
                                      15,       16,   17,        63,    4095,      4096,
                                      4097,     5003, kPart - 1, kPart, kPart + 1, 2 * kPart + 5,
                                      1'000'003};
  std::vector<ByteRange> ranges = {{-1, 77}};
  int64_t at = 0;
  for (const int64_t size : sizes) {
    for (int shift = 0; shift < 3; ++shift) {  // starts at every place within 16 bytes
      at += static_cast<int64_t>(rng() % 19);
      ranges.push_back({at, size});
      at += size;
    }
  }
  Bytes data(static_cast<size_t>(at));  // the last range ends with the array
  for (uint8_t& b : data) b = static_cast<uint8_t>(rng());
  const DeviceArray<uint8_t> d_data(data);
  const DeviceArray<ByteRange> d_ranges(ranges);
  for (const int64_t max_bytes : {int64_t{0}, int64_t{1} << 20}) {  // of blocks: one, and many
    const DeviceArray<uint32_t> crc(ranges.size());
    ASSERT_TRUE(LaunchCrc32c({.data = d_data.get(),
                              .ranges = d_ranges.get(),
                              .crc = crc.get(),
                              .num_ranges = static_cast<int>(ranges.size()),
                              .max_bytes = max_bytes},
                             nullptr)
                    .ok());
    const std::vector<uint32_t> got = crc.Get();
    EXPECT_EQ(got[0], 0u);
    for (size_t i = 1; i < ranges.size(); ++i) {
      EXPECT_EQ(got[i],
                Crc32c(data.data() + ranges[i].offset, static_cast<size_t>(ranges[i].bytes)))
          << "offset " << ranges[i].offset << " bytes " << ranges[i].bytes;
    }
  }
}

struct Shape {
  const char* name;
  KvFormatId format = KvFormatId::kFp8;
  int head_dim = 128, window = 256, shift = 1, num_layers = 1, num_seqs = 1, num_kv_heads = 1;
  int num_tokens = 0;  // of each sequence; survivors at random
  friend void PrintTo(const Shape& c, std::ostream* os) { *os << c.name; }
};

const Shape kShapes[] = {
    {"one_token", KvFormatId::kFp8, 128, 256, 1, 1, 1, 1, 1},
    {"two_tokens", KvFormatId::kFp8, 64, 1, 0, 2, 1, 3, 2},
    {"ring_not_full", KvFormatId::kFp8, 128, 256, 0, 2, 3, 2, 100},
    {"fp8_d128", KvFormatId::kFp8, 128, 256, 1, 2, 2, 4, 1300},
    {"fp8_odd_window", KvFormatId::kFp8, 128, 33, 0, 3, 2, 5, 403},
    {"fp8_window_7", KvFormatId::kFp8, 64, 7, 1, 2, 3, 8, 211},
    {"int8_d64", KvFormatId::kInt8, 64, 31, 0, 2, 2, 3, 333},
    {"int8h_d128", KvFormatId::kInt8H, 128, 65, 1, 1, 2, 3, 500},
    {"k8v8_d80", KvFormatId::kK8V8, 80, 9, 1, 1, 2, 3, 97},
    {"bf16_d64", KvFormatId::kBf16, 64, 17, 0, 2, 2, 3, 129},
    {"bf16_d128", KvFormatId::kBf16, 128, 257, 1, 1, 2, 3, 700},
    {"bf16_d256", KvFormatId::kBf16, 256, 3, 1, 1, 2, 3, 70},
    {"fp8_d16", KvFormatId::kFp8, 16, 5, 1, 1, 2, 3, 77},
    {"dense", KvFormatId::kFp8, 128, 0, 1, 2, 2, 3, 150},
    {"long", KvFormatId::kFp8, 128, 256, 1, 1, 1, 2, 20'000},
};

class PackGpuShapes : public PackGpu, public testing::WithParamInterface<Shape> {
 protected:
  // As num_tokens tokens would leave them.
  static std::vector<SpanLength> Lengths(const Shape& c, uint32_t seed) {
    std::mt19937 rng(seed);
    const int ring = std::min(c.window, c.num_tokens - 1), left = c.num_tokens - 1 - ring;
    std::vector<SpanLength> lengths(
        static_cast<size_t>(c.num_layers * c.num_seqs * c.num_kv_heads));
    for (size_t i = 0; i < lengths.size(); ++i) {
      int survivors = static_cast<int>(rng() % (static_cast<uint32_t>(left) + 1u));
      if (i % 4 == 0 || c.window == 0) survivors = left;
      if (i % 4 == 1 && c.window > 0) survivors = 0;
      lengths[i] = {survivors, ring};
    }
    return lengths;
  }
  static DeviceSpanShape SpanShape(const Shape& c, uint32_t seed) {
    return {.format = c.format,
            .head_dim = c.head_dim,
            .window = c.window,
            .shift = c.shift,
            .num_layers = c.num_layers,
            .num_kv_heads = c.num_kv_heads,
            .spare_pages = 5,
            .seed = seed};
  }
  struct Packed {
    std::vector<ByteRange> ranges;  // [slots, num_layers]
    std::vector<uint32_t> crc;
    Bytes staging;
  };
  // By the CPU, with 0xff between the items.
  static Packed OnTheCpu(DeviceSpanCase& spans, const std::vector<int32_t>& slots) {
    Packed packed;
    const int heads = spans.shape().num_kv_heads;
    for (const int32_t slot : slots) {
      for (int layer = 0; layer < spans.shape().num_layers; ++layer) {
        const int64_t offset = static_cast<int64_t>(packed.staging.size());
        if (slot < 0) {
          packed.ranges.push_back({offset, 0});
          packed.crc.push_back(0);
          continue;
        }
        const Span* first = &spans.span(layer, slot, 0);
        Bytes item(KvPackBytes(spans.layout(), first, heads));
        KvPackCpu(spans.layout(), first, heads, item.data());
        packed.ranges.push_back({offset, static_cast<int64_t>(item.size())});
        packed.crc.push_back(Crc32c(item.data(), item.size()));
        item.resize((item.size() + 15) / 16 * 16, 0xff);
        packed.staging.insert(packed.staging.end(), item.begin(), item.end());
      }
    }
    return packed;
  }
  static Packed OnTheGpu(const DeviceSpanCase& spans, const std::vector<int32_t>& slots,
                         size_t staging_bytes) {
    const size_t items = slots.size() * static_cast<size_t>(spans.shape().num_layers);
    const DeviceArray<int32_t> d_slots(slots);
    const DeviceArray<uint8_t> staging(staging_bytes);
    const DeviceArray<ByteRange> ranges(items);
    const DeviceArray<uint32_t> crc(items);
    EXPECT_TRUE(LaunchKvPack({.spans = spans.device(),
                              .slots = d_slots.get(),
                              .num_seqs = static_cast<int>(slots.size()),
                              .num_layers = spans.shape().num_layers,
                              .staging = staging.get(),
                              .staging_bytes = static_cast<int64_t>(staging_bytes),
                              .ranges = ranges.get(),
                              .crc = crc.get()},
                             nullptr)
                    .ok());
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    return {.ranges = ranges.Get(), .crc = crc.Get(), .staging = staging.Get()};
  }
  // Whether the tests of missing pages take the entry of the span's tables away.
  static bool Missing(size_t span, int entry) {
    return (span + static_cast<size_t>(entry)) % 2 == 0;
  }
  static void TakePagesAway(DeviceSpanCase& spans) {
    for (auto* tables : {spans.survivor_pages.get(), spans.ring_pages.get()}) {
      std::vector<int32_t> pages = tables->Get();
      const size_t size = pages.size() / spans.state->size();
      for (size_t i = 0; i < pages.size(); ++i) {
        if (Missing(i / size, static_cast<int>(i % size))) pages[i] = -1;
      }
      tables->Set(pages);
    }
  }
  // Slots in reverse, with one that is not there.
  static std::vector<int32_t> Slots(const Shape& c) {
    std::vector<int32_t> slots;
    for (int s = c.num_seqs - 1; s >= 0; --s) slots.push_back(s);
    slots.insert(slots.begin() + 1, -1);
    return slots;
  }
};

TEST_P(PackGpuShapes, PackGivesTheCpusBytes) {
  const Shape& c = GetParam();
  DeviceSpanCase spans(SpanShape(c, 3), c.num_seqs, Lengths(c, 4));
  const std::vector<int32_t> slots = Slots(c);
  const Packed want = OnTheCpu(spans, slots), got = OnTheGpu(spans, slots, want.staging.size());
  EXPECT_TRUE(Same(got.ranges, want.ranges));
  EXPECT_EQ(got.crc, want.crc);
  EXPECT_TRUE(got.staging == want.staging);
  EXPECT_TRUE(OnTheGpu(spans, slots, want.staging.size()).staging == want.staging) << "again";
}

TEST_P(PackGpuShapes, WhatDoesNotFitIsNotWritten) {
  const Shape& c = GetParam();
  DeviceSpanCase spans(SpanShape(c, 3), c.num_seqs, Lengths(c, 4));
  const std::vector<int32_t> slots = Slots(c);
  const Packed want = OnTheCpu(spans, slots);
  const Packed got = OnTheGpu(spans, slots, want.staging.size() - 16);
  for (size_t i = 0; i < want.ranges.size(); ++i) {
    const ByteRange& range = want.ranges[i];
    const bool fits = range.offset + range.bytes <= static_cast<int64_t>(got.staging.size());
    EXPECT_EQ(got.ranges[i].offset, fits ? range.offset : -1);
    EXPECT_EQ(got.ranges[i].bytes, range.bytes);
    EXPECT_EQ(got.crc[i], fits ? want.crc[i] : 0);
    for (int64_t at = range.offset; at < range.offset + range.bytes; ++at) {
      if (at >= static_cast<int64_t>(got.staging.size())) break;
      const size_t b = static_cast<size_t>(at);
      ASSERT_EQ(got.staging[b], fits ? want.staging[b] : 0xff) << at;
    }
  }
}

// Into spans whose pages lie elsewhere and hold other tokens: every byte of their pages, rows,
// flags and counters is then what the CPU leaves.
TEST_P(PackGpuShapes, UnpackDoesWhatTheCpuDoes) {
  const Shape& c = GetParam();
  const std::vector<SpanLength> lengths = Lengths(c, 4);
  DeviceSpanCase from(SpanShape(c, 3), c.num_seqs, lengths);
  DeviceSpanCase to(SpanShape(c, 5), c.num_seqs, lengths);
  std::vector<int32_t> slots;
  for (int s = 0; s < c.num_seqs; ++s) slots.push_back(s);
  const Packed packed = OnTheCpu(from, slots);
  const DeviceArray<uint8_t> staging(packed.staging);
  const DeviceArray<ByteRange> ranges(packed.ranges);
  slots[0] = -1;  // stays as it is
  const DeviceArray<int32_t> d_slots(slots),
      num_tokens(std::vector<int32_t>(slots.size(), c.num_tokens));
  ASSERT_TRUE(LaunchKvUnpack({.spans = to.device(),
                              .slots = d_slots.get(),
                              .num_tokens = num_tokens.get(),
                              .num_seqs = c.num_seqs,
                              .num_layers = c.num_layers,
                              .staging = staging.get(),
                              .ranges = ranges.get()},
                             nullptr)
                  .ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  std::vector<SpanState> states = to.state->Get();
  Bytes newest = to.newest->Get(), evict = to.ring_evict->Get();
  const size_t newest_stride = static_cast<size_t>(to.device().newest_stride());
  const size_t evict_stride = static_cast<size_t>(to.device().evict_stride());
  for (int s = 1; s < c.num_seqs; ++s) {
    for (int layer = 0; layer < c.num_layers; ++layer) {
      const ByteRange& range = packed.ranges[static_cast<size_t>(s * c.num_layers + layer)];
      const uint8_t* data = packed.staging.data() + range.offset;
      std::vector<PackedHead> heads(static_cast<size_t>(c.num_kv_heads));
      Span* first = &to.span(layer, s, 0);
      ASSERT_TRUE(ParsePacked(to.layout(), c.num_kv_heads, c.num_tokens, data,
                              static_cast<size_t>(range.bytes), heads.data())
                      .ok());
      KvUnpackCpu(to.layout(), c.num_kv_heads, c.num_tokens, data, heads.data(), first);
    }
  }
  for (int layer = 0; layer < c.num_layers; ++layer) {
    for (int s = 0; s < c.num_seqs; ++s) {
      for (int g = 0; g < c.num_kv_heads; ++g) {
        SCOPED_TRACE("layer " + std::to_string(layer) + " seq " + std::to_string(s));
        const Span& span = to.span(layer, s, g);
        const size_t i = to.Index(layer, s, g);
        EXPECT_EQ(states[i].num_survivors, span.num_survivors);
        EXPECT_EQ(states[i].num_ring, span.num_ring);
        EXPECT_EQ(states[i].ring_start, span.ring_start);
        EXPECT_EQ(states[i].num_tokens, span.num_tokens);
        EXPECT_EQ(
            std::memcmp(span.newest, &newest[i * newest_stride], TokenBytes(c.format, c.head_dim)),
            0);
        EXPECT_EQ(std::memcmp(span.ring_evict, &evict[i * evict_stride],
                              static_cast<size_t>(span.num_ring)),
                  0);
        EXPECT_EQ(evict[i * evict_stride + static_cast<size_t>(c.window)], span.newest_evict);
      }
    }
  }
  const Bytes pages = to.pages->Get();
  EXPECT_EQ(std::memcmp(pages.data(), to.layout().pages, pages.size()), 0);
}

// A token without a page is zeros on the wire, and on the way back it is dropped: the other tokens
// come and go as before, and pages that no table names keep their bytes.
TEST_P(PackGpuShapes, MissingPages) {
  const Shape& c = GetParam();
  const std::vector<SpanLength> lengths = Lengths(c, 4);
  DeviceSpanCase spans(SpanShape(c, 3), c.num_seqs, lengths);
  const std::vector<int32_t> slots = Slots(c);
  Packed packed = OnTheCpu(spans, slots);
  const Packed whole = packed;
  const size_t row_bytes = TokenBytes(c.format, c.head_dim);
  const int slots_per_page = SlotsPerPage(c.format, c.head_dim);
  for (size_t item = 0; item < packed.ranges.size(); ++item) {
    const int32_t slot = slots[item / static_cast<size_t>(c.num_layers)];
    if (slot < 0) continue;
    const int layer = static_cast<int>(item % static_cast<size_t>(c.num_layers));
    uint8_t* start = packed.staging.data() + packed.ranges[item].offset;
    uint8_t* row = start + static_cast<size_t>(c.num_kv_heads) * kPackedHeadBytes;
    for (int g = 0; g < c.num_kv_heads; ++g) {
      const Span& span = spans.span(layer, slot, g);
      for (int i = 0; i < span.num_survivors + span.num_ring; ++i, row += row_bytes) {
        const int age = i - span.num_survivors;
        const int at = age < 0 ? i : (span.ring_start + age) % c.window;
        if (Missing(spans.Index(layer, slot, g), at / slots_per_page)) {
          std::fill_n(row, row_bytes, uint8_t{0});
        }
      }
      row += row_bytes + static_cast<size_t>(span.num_ring);
    }
    packed.crc[item] = Crc32c(start, static_cast<size_t>(packed.ranges[item].bytes));
  }
  TakePagesAway(spans);
  const Packed got = OnTheGpu(spans, slots, packed.staging.size());
  EXPECT_TRUE(Same(got.ranges, packed.ranges));
  EXPECT_TRUE(got.staging == packed.staging);
  EXPECT_EQ(got.crc, packed.crc);

  DeviceSpanCase to(SpanShape(c, 5), c.num_seqs, lengths);
  const Bytes before = to.pages->Get();
  TakePagesAway(to);
  const DeviceArray<uint8_t> staging(whole.staging);
  const DeviceArray<ByteRange> ranges(whole.ranges);
  const DeviceArray<int32_t> d_slots(slots),
      num_tokens(std::vector<int32_t>(slots.size(), c.num_tokens));
  ASSERT_TRUE(LaunchKvUnpack({.spans = to.device(),
                              .slots = d_slots.get(),
                              .num_tokens = num_tokens.get(),
                              .num_seqs = static_cast<int>(slots.size()),
                              .num_layers = c.num_layers,
                              .staging = staging.get(),
                              .ranges = ranges.get()},
                             nullptr)
                  .ok());
  const Bytes pages = to.pages->Get();
  for (size_t item = 0; item < whole.ranges.size(); ++item) {
    const int32_t slot = slots[item / static_cast<size_t>(c.num_layers)];
    if (slot < 0) continue;
    const int layer = static_cast<int>(item % static_cast<size_t>(c.num_layers));
    const uint8_t* data = whole.staging.data() + whole.ranges[item].offset;
    std::vector<PackedHead> heads(static_cast<size_t>(c.num_kv_heads));
    ASSERT_TRUE(ParsePacked(to.layout(), c.num_kv_heads, c.num_tokens, data,
                            static_cast<size_t>(whole.ranges[item].bytes), heads.data())
                    .ok());
    KvUnpackCpu(to.layout(), c.num_kv_heads, c.num_tokens, data, heads.data(),
                &to.span(layer, slot, 0));
    for (int g = 0; g < c.num_kv_heads; ++g) {
      const Span& span = to.span(layer, slot, g);
      for (const PageTable* table : {&span.survivors, &span.ring}) {
        for (int entry = 0; entry < table->num_pages; ++entry) {
          if (!Missing(to.Index(layer, slot, g), entry)) continue;
          std::copy_n(before.data() + table->At(entry) * PageBytes(c.head_dim),
                      PageBytes(c.head_dim), to.layout().Page(table->At(entry)));
        }
      }
    }
  }
  EXPECT_EQ(std::memcmp(pages.data(), to.layout().pages, pages.size()), 0);
}

INSTANTIATE_TEST_SUITE_P(All, PackGpuShapes, testing::ValuesIn(kShapes),
                         [](const auto& c) { return std::string(c.param.name); });

// Lengths are read on the device: a graph packs what is there when it runs.
TEST_F(PackGpu, AGraphReadsLengthsAgain) {
  DeviceSpanCase spans({.window = 16, .num_layers = 2, .num_kv_heads = 2}, 1,
                       {{300, 16}, {0, 16}, {41, 16}, {7, 16}});
  const DeviceArray<int32_t> slots(std::vector<int32_t>{0});
  const DeviceArray<uint8_t> staging(400 * 1024);
  const DeviceArray<ByteRange> ranges(2);
  const DeviceArray<uint32_t> crc(2);
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  ASSERT_TRUE(LaunchKvPack({.spans = spans.device(),
                            .slots = slots.get(),
                            .num_seqs = 1,
                            .num_layers = 2,
                            .staging = staging.get(),
                            .staging_bytes = static_cast<int64_t>(staging.size()),
                            .ranges = ranges.get(),
                            .crc = crc.get()},
                           stream)
                  .ok());
  ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
  for (const int survivors : {300, 150, 1}) {
    std::vector<SpanState> states = spans.state->Get();
    states[0].num_survivors = survivors;
    spans.span(0, 0, 0).num_survivors = survivors;
    spans.state->Set(states);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    const Bytes got = staging.Get();
    for (int layer = 0; layer < 2; ++layer) {
      const Span* first = &spans.span(layer, 0, 0);
      Bytes want(KvPackBytes(spans.layout(), first, 2));
      KvPackCpu(spans.layout(), first, 2, want.data());
      const ByteRange range = ranges.Get()[static_cast<size_t>(layer)];
      ASSERT_EQ(range.bytes, static_cast<int64_t>(want.size()));
      EXPECT_TRUE(std::equal(want.begin(), want.end(), got.begin() + range.offset));
      EXPECT_EQ(crc.Get()[static_cast<size_t>(layer)], Crc32c(want.data(), want.size()));
    }
  }
  EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
  EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
}

TEST(PackGpuParams, BadOnesAreRefused) {
  alignas(16) uint8_t bytes[32] = {};
  alignas(16) int32_t i = 0;
  uint32_t crc = 0;
  SpanState state;
  ByteRange range;
  const auto code = [](const absl::Status& status) { return status.code(); };
  constexpr auto kBad = absl::StatusCode::kInvalidArgument;
  const DeviceSpans spans = {.head_dim = 128,
                             .num_layers = 2,
                             .max_sequences = 1,
                             .num_kv_heads = 1,
                             .pages = bytes,
                             .state = &state,
                             .survivor_pages = &i,
                             .newest = bytes,
                             .ring_evict = bytes};
  const KvPackCudaParams pack = {.spans = spans,
                                 .slots = &i,
                                 .num_seqs = 1,
                                 .num_layers = 2,
                                 .staging = bytes,
                                 .staging_bytes = 32,
                                 .ranges = &range};
  EXPECT_TRUE(ValidateKvPackCuda(pack).ok());
  KvPackCudaParams p = pack;
  p.staging_bytes = 31;
  EXPECT_EQ(code(LaunchKvPack(p, nullptr)), kBad);
  p = pack;
  p.staging = bytes + 4;
  EXPECT_EQ(code(LaunchKvPack(p, nullptr)), kBad);
  p = pack;
  p.first_layer = 1;
  EXPECT_EQ(code(LaunchKvPack(p, nullptr)), kBad);
  p = pack;
  p.ranges = nullptr;
  EXPECT_EQ(code(LaunchKvPack(p, nullptr)), kBad);
  p = pack;
  p.spans.window = 1;  // and no ring pages
  EXPECT_EQ(code(LaunchKvPack(p, nullptr)), kBad);
  p = pack;
  p.spans.head_dim = 72;
  EXPECT_EQ(code(LaunchKvPack(p, nullptr)), absl::StatusCode::kUnimplemented);
  const absl::Status no_format = absl::InvalidArgumentError("kv_pack: format=200");
  p = pack;
  p.spans.format = static_cast<KvFormatId>(200);
  EXPECT_EQ(ValidateKvPackCuda(p), no_format);
  EXPECT_EQ(LaunchKvPack(p, nullptr), no_format);
  const KvUnpackCudaParams unpack = {.spans = spans,
                                     .slots = &i,
                                     .num_tokens = &i,
                                     .num_seqs = 1,
                                     .num_layers = 2,
                                     .staging = bytes,
                                     .ranges = &range};
  EXPECT_TRUE(ValidateKvUnpackCuda(unpack).ok());
  KvUnpackCudaParams u = unpack;
  u.num_tokens = nullptr;
  EXPECT_EQ(code(LaunchKvUnpack(u, nullptr)), kBad);
  u = unpack;
  u.spans.format = static_cast<KvFormatId>(std::size(kKvFormats));  // one past the last
  const absl::Status status = ValidateKvUnpackCuda(u);
  EXPECT_EQ(code(status), kBad);
  EXPECT_NE(status.message().find("format="), std::string::npos) << status;
  u = unpack;
  u.num_seqs = 40'000;
  EXPECT_EQ(code(LaunchKvUnpack(u, nullptr)), kBad);
  EXPECT_EQ(code(LaunchCrc32c({.data = bytes, .ranges = &range, .num_ranges = 1}, nullptr)), kBad);
  EXPECT_EQ(code(LaunchCrc32c({.data = bytes, .ranges = &range, .crc = &crc, .num_ranges = 65536},
                              nullptr)),
            kBad);
}

}  // namespace
}  // namespace winnow::kernels
