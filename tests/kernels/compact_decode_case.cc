#include "tests/kernels/compact_decode_case.h"

#include <cmath>
#include <random>

#include "kernels/cuda/compact_decode_attention.h"
#include "tests/kernels/decode_plan_memory.h"

namespace winnow::kernels {

std::vector<SpanLength> Lengths(const DecodeCase& c) {
  std::vector<SpanLength> out;
  for (int i = 0; i < c.num_sequences * c.num_kv_heads; ++i) {
    out.push_back(c.lengths[static_cast<size_t>(i) % c.lengths.size()]);
  }
  return out;
}
DeviceSpanCase Spans(const DecodeCase& c) {
  const auto sink = [&c](int token, float* k, float* v) {
    for (int d = 0; token % 7 == 3 && d < c.head_dim; ++d) {
      k[d] *= 8.0f;
      v[d] = 0.0f;
    }
  };
  DeviceSpanShape shape{.format = c.format,
                        .head_dim = c.head_dim,
                        .window = c.window,
                        .num_kv_heads = c.num_kv_heads,
                        .spare_pages = 3};
  if (c.sinks) shape.token = sink;
  return DeviceSpanCase(shape, c.num_sequences, Lengths(c));
}

std::vector<int32_t> AllSlots(const DecodeCase& c) {
  std::vector<int32_t> slots;
  for (int s = 0; s < c.num_sequences; ++s) slots.push_back(s);
  return slots;
}
std::vector<float> RandomQueries(const DecodeCase& c, int num_sequences) {
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  std::vector<float> q(static_cast<size_t>(num_sequences * c.num_kv_heads * c.group * c.head_dim));
  for (float& x : q) x = c.q_scale * normal(rng);
  return q;
}
std::vector<float> Attend(const DecodeCase& c, const DeviceSpanCase& spans,
                          const std::vector<int32_t>& slots, const std::vector<float>& q, int times,
                          int force_blocks) {
  const int rows = static_cast<int>(slots.size()) * c.num_kv_heads;
  PlanMemory memory(rows, spans.total_pages(), c.group, c.head_dim);
  DeviceArray<int32_t> device_slots(slots);
  DeviceArray<float> device_q(q), out(q.size());
  cudaStream_t stream = nullptr;
  EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  absl::Status status = LaunchDecodePlan({.spans = spans.device(),
                                          .slots = device_slots.get(),
                                          .num_seqs = static_cast<int>(slots.size()),
                                          .plan = memory.plan(),
                                          .force_blocks = force_blocks},
                                         stream);
  EXPECT_TRUE(status.ok()) << status;
  for (int i = 0; i < times; ++i) {
    status =
        LaunchCompactDecodeAttention({.spans = spans.device(),
                                      .plan = memory.plan(),
                                      .q = device_q.get(),
                                      .out_f32 = out.get(),
                                      .num_seqs = static_cast<int>(slots.size()),
                                      .num_heads = c.num_kv_heads * c.group,
                                      .scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim)),
                                      .overlap_launch = i > 0},
                                     stream);
    EXPECT_TRUE(status.ok()) << status;
  }
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
  for (const int32_t left : memory.arrivals.Get()) EXPECT_EQ(left, 0);
  for (const int32_t left : memory.next_piece.Get()) EXPECT_EQ(left, 0);
  EXPECT_EQ(memory.overflow.Get()[0], 0);
  memory.pieces.Get();  // checks what lies around them
  memory.out.Get();
  memory.norm.Get();
  return out.Get();
}
}  // namespace winnow::kernels
