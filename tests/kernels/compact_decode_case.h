#pragma once

#include <cstdint>
#include <ostream>
#include <string>
#include <vector>

#include "kernels/kv_format.h"
#include "tests/kernels/device_span_case.h"

// What the tests of LaunchCompactDecodeAttention share.
namespace winnow::kernels {

struct DecodeCase {
  std::string name;
  KvFormatId format = KvFormatId::kFp8;
  int head_dim = 128, group = 4, num_kv_heads = 2, window = 256;
  std::vector<SpanLength> lengths;  // in turn over sequences and heads
  int num_sequences = 4;
  float q_scale = 2.0f;
  bool sinks = false;  // of every seventh token the key is long and the value 0

  friend void PrintTo(const DecodeCase& c, std::ostream* os) {
    *os << c.name << ": " << KvFormatName(c.format) << " d" << c.head_dim << " group " << c.group
        << " heads " << c.num_kv_heads << " window " << c.window << " sequences " << c.num_sequences
        << (c.sinks ? " sinks" : "");
    for (const SpanLength& l : c.lengths) *os << " " << l.survivors << "+" << l.ring;
  }
};
// Of every sequence and head.
std::vector<SpanLength> Lengths(const DecodeCase& c);
DeviceSpanCase Spans(const DecodeCase& c);
std::vector<int32_t> AllSlots(const DecodeCase& c);
// [num_sequences, heads, head_dim]
std::vector<float> RandomQueries(const DecodeCase& c, int num_sequences);

// Plan and attention, that `times` times. Output [sequences of `slots`, heads, head_dim]; a row
// without a sequence keeps its 0xff. Checks that counters end as they began.
std::vector<float> Attend(const DecodeCase& c, const DeviceSpanCase& spans,
                          const std::vector<int32_t>& slots, const std::vector<float>& q,
                          int times = 1, int force_blocks = 0);

}  // namespace winnow::kernels
