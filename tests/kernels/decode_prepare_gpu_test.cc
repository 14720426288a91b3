// LaunchDecodeStep and LaunchDecodePrepare against DecodePrepareCpu, token by token: the same
// bits of queries, decisions, flags and stored tokens, and every page held exactly once.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "kernels/cuda/decode_prepare.h"
#include "kernels/cuda/decode_step.h"
#include "kernels/decode_prepare.h"
#include "kernels/rope.h"
#include "tests/kernels/device_span_case.h"
#include "tests/kernels/random_shapes.h"
#include "tests/kernels/valid_device_spans.h"

namespace winnow::kernels {
namespace {

struct PrepareCase {
  std::string name;
  KvFormatId format = KvFormatId::kFp8;
  int head_dim = 128, group = 2, num_kv_heads = 2, window = 5, shift = 1;
  DecisionRule rule = {
      .source = DecisionSource::kBorrowedAfterQNorm, .scale = 1.0f, .offset = 0.1f};
  bool norm = true;
  int num_layers = 2, num_sequences = 3, num_steps = 90;

  friend void PrintTo(const PrepareCase& c, std::ostream* os) {
    *os << c.name << ": " << KvFormatName(c.format) << " d" << c.head_dim << " group " << c.group
        << " heads " << c.num_kv_heads << " window " << c.window << " shift " << c.shift;
  }
};

class DecodePrepareGpu : public testing::TestWithParam<PrepareCase> {
 protected:
  void SetUp() override { RequireGpu(); }
};

TEST_P(DecodePrepareGpu, HasTheCpusBitsTokenByToken) {
  const PrepareCase& c = GetParam();
  const int heads = c.num_kv_heads * c.group;
  const int slots = SlotsPerPage(c.format, c.head_dim);
  const int pages_per_span = (c.num_steps + slots - 1) / slots + (c.window + slots - 1) / slots;
  const int num_spans = c.num_layers * c.num_sequences * c.num_kv_heads;
  const int num_pages = pages_per_span * num_spans;
  // Empty spans with room to grow; the CPU's pages come from the front of the pool's memory.
  DeviceSpanCase spans({.format = c.format,
                        .head_dim = c.head_dim,
                        .window = c.window,
                        .shift = c.shift,
                        .num_layers = c.num_layers,
                        .num_kv_heads = c.num_kv_heads,
                        .spare_pages = num_pages,
                        .max_survivors = c.num_steps},
                       c.num_sequences,
                       std::vector<SpanLength>(static_cast<size_t>(num_spans), SpanLength{}));
  const std::vector<SpanState> no_tokens(static_cast<size_t>(num_spans));
  spans.state->Set(no_tokens);
  for (int l = 0; l < c.num_layers; ++l) {
    for (int s = 0; s < c.num_sequences; ++s) {
      for (int g = 0; g < c.num_kv_heads; ++g) {
        spans.span(l, s, g).num_tokens = 0;
        spans.span(l, s, g).newest_evict = 0;
      }
    }
  }
  std::vector<int32_t> cpu_free = spans.spare_pages();
  DeviceArray<int32_t> free_pages(spans.spare_pages()), num_free(std::vector<int32_t>{num_pages}),
      exhausted(std::vector<int32_t>{0});
  const DevicePagePool pool{free_pages.get(), num_free.get(), exhausted.get()};

  std::mt19937 rng(3);
  std::normal_distribution<float> normal;
  const auto random = [&](size_t n) {
    std::vector<float> x(n);
    for (float& value : x) value = normal(rng);
    return x;
  };
  const size_t dim = static_cast<size_t>(c.head_dim), seqs = static_cast<size_t>(c.num_sequences);
  const size_t kv = static_cast<size_t>(c.num_kv_heads), q_size = static_cast<size_t>(heads) * dim;
  const std::vector<float> q_norm = random(dim), k_norm = random(dim);
  const absl::StatusOr<RopeTable> rope = BuildRopeTable(c.head_dim, c.num_steps, 10000.0f);
  ASSERT_TRUE(rope.ok());
  DeviceArray<float> d_q_norm(q_norm), d_k_norm(k_norm), d_cos(rope->cos), d_sin(rope->sin);
  // One projection row: q, k and v of a sequence side by side.
  const size_t row = q_size + 2 * kv * dim;
  DeviceArray<float> d_qkv(seqs * row), d_q_out(seqs * q_size), d_logits(seqs * kv);
  DeviceArray<uint8_t> d_decisions(seqs * kv);
  // Sequence s is absent from every 7th step but one: lengths differ.
  const auto present = [](int step, int s) { return (step + s) % 7 != 3 || s == 0; };
  std::vector<int32_t> length(seqs, 0);
  const KvLayout layout = spans.layout();
  const size_t token_bytes = TokenBytes(c.format, c.head_dim);

  for (int step = 0; step < c.num_steps; ++step) {
    std::vector<int32_t> batch, positions;  // in the CPU's batch: only those present
    std::vector<int32_t> slot(seqs, -1), d_positions(seqs, 0);
    for (int s = c.num_sequences - 1; s >= 0; --s) {
      if (!present(step, s)) continue;
      const size_t place = seqs - 1 - static_cast<size_t>(s);
      slot[place] = s;
      d_positions[place] = length[static_cast<size_t>(s)];
      batch.push_back(s);
      positions.push_back(length[static_cast<size_t>(s)]++);
    }
    DeviceArray<int32_t> device_slots(slot), device_positions(d_positions);
    const DecodeStepParams step_params{.spans = spans.device(),
                                       .pool = pool,
                                       .slots = device_slots.get(),
                                       .num_seqs = c.num_sequences};
    absl::Status status = LaunchDecodeStep(step_params, nullptr);
    ASSERT_TRUE(status.ok()) << status;
    for (int l = 0; l < c.num_layers; ++l) {
      std::vector<float> qkv = random(seqs * row), logits = random(seqs * kv);
      const float edges[] = {0.0f, -0.0f, 0.1f, NAN, INFINITY, -INFINITY};  // at the threshold
      if (step % 3 == 1) logits[0] = edges[step / 3 % 6];
      if (step % 11 == 5) {  // a token of zeros, and one with a large value
        std::fill_n(qkv.begin(), row, 0.0f);
        qkv[(seqs - 1) * row + q_size + 3] = 1e6f;
      }
      d_qkv.Set(qkv);
      d_logits.Set(logits);
      d_q_out.Fill(0xff);
      d_decisions.Fill(0xff);
      DmsCompactParams compact{
          .q = d_qkv.get(),
          .k = d_qkv.get() + q_size,
          .v = d_qkv.get() + q_size + kv * dim,
          .q_stride = static_cast<int64_t>(row),
          .k_stride = static_cast<int64_t>(row),
          .v_stride = static_cast<int64_t>(row),
          .q_norm = c.norm ? d_q_norm.get() : nullptr,
          .k_norm = c.norm ? d_k_norm.get() : nullptr,
          .logit_inputs = d_logits.get(),
          .logit_stride = static_cast<int64_t>(kv),
          .positions = device_positions.get(),
          .rope_cos = d_cos.get(),
          .rope_sin = d_sin.get(),
          .num_positions = c.num_steps,
          .rule = c.rule,
          .format = c.format,
          .q_out = d_q_out.get(),
          .decisions = d_decisions.get(),
          .num_tokens = c.num_sequences,
          .num_heads = heads,
          .num_kv_heads = c.num_kv_heads,
          .head_dim = c.head_dim,
      };
      status = LaunchDecodePrepare(
          {.compact = compact, .spans = spans.device(), .slots = device_slots.get(), .layer = l},
          nullptr);
      ASSERT_TRUE(status.ok()) << status;

      // The CPU, on the rows of the sequences that are there, in the same order.
      std::vector<float> cpu_qkv, cpu_logits, cpu_q(batch.size() * q_size, NAN);
      std::vector<Span*> cpu_spans;
      std::vector<uint8_t> cpu_rows(batch.size() * kv * token_bytes),
          cpu_decisions(batch.size() * kv);
      for (size_t place = 0; place < seqs; ++place) {
        if (slot[place] < 0) continue;
        const auto at = [](std::vector<float>& v, size_t i) {
          return v.begin() + static_cast<std::ptrdiff_t>(i);
        };
        cpu_qkv.insert(cpu_qkv.end(), at(qkv, place * row), at(qkv, (place + 1) * row));
        cpu_logits.insert(cpu_logits.end(), at(logits, place * kv), at(logits, (place + 1) * kv));
        cpu_spans.push_back(&spans.span(l, slot[place], 0));
        for (int g = 0; g < c.num_kv_heads; ++g) {
          Span& span = spans.span(l, slot[place], g);
          const PageNeed need = CountPageNeed(layout, span, 1, nullptr, 0);
          for (int i = 0; i < need.ring; ++i) {
            spans.AddPage(&span.ring, cpu_free.back());
            cpu_free.pop_back();
          }
          for (int i = 0; i < need.survivors; ++i) {
            spans.AddPage(&span.survivors, cpu_free.back());
            cpu_free.pop_back();
          }
        }
      }
      compact.q = cpu_qkv.data();
      compact.k = cpu_qkv.data() + q_size;
      compact.v = cpu_qkv.data() + q_size + kv * dim;
      compact.q_norm = c.norm ? q_norm.data() : nullptr;
      compact.k_norm = c.norm ? k_norm.data() : nullptr;
      compact.logit_inputs = cpu_logits.data();
      compact.positions = positions.data();
      compact.rope_cos = rope->cos.data();
      compact.rope_sin = rope->sin.data();
      compact.q_out = cpu_q.data();
      compact.rows = cpu_rows.data();
      compact.decisions = cpu_decisions.data();
      compact.num_tokens = static_cast<int>(batch.size());
      status = DecodePrepareCpu({.compact = compact, .layout = layout, .spans = cpu_spans.data()},
                                nullptr);
      ASSERT_TRUE(status.ok()) << status;

      const std::vector<float> got_q = d_q_out.Get();
      const std::vector<uint8_t> got_decisions = d_decisions.Get();
      size_t i = 0;
      for (size_t place = 0; place < seqs; ++place) {
        if (slot[place] < 0) {
          EXPECT_EQ(got_decisions[place * kv], 0xff);  // not written
          continue;
        }
        ASSERT_EQ(std::memcmp(&got_q[place * q_size], &cpu_q[i * q_size], q_size * sizeof(float)),
                  0)
            << "queries at step " << step << " layer " << l << " sequence " << slot[place];
        ASSERT_EQ(std::memcmp(&got_decisions[place * kv], &cpu_decisions[i * kv], kv), 0)
            << "decisions at step " << step << " layer " << l << " sequence " << slot[place];
        ++i;
      }
    }
    if (step % 8 != 0 && step + 1 != c.num_steps) continue;
    // The whole cache, span by span.
    const std::vector<SpanState> state = spans.state->Get();
    const std::vector<int32_t> survivors = spans.survivor_pages->Get();
    const std::vector<int32_t> ring = spans.ring_pages->Get();
    const std::vector<uint8_t> pages = spans.pages->Get(), newest = spans.newest->Get();
    const std::vector<uint8_t> flags = spans.ring_evict->Get();
    const DeviceSpans d = spans.device();
    std::vector<int32_t> held = free_pages.Get();
    const int32_t left = num_free.Get()[0];
    ASSERT_GE(left, 0);
    held.resize(static_cast<size_t>(left));
    for (int l = 0; l < c.num_layers; ++l) {
      for (int s = 0; s < c.num_sequences; ++s) {
        for (int g = 0; g < c.num_kv_heads; ++g) {
          const size_t at = spans.Index(l, s, g);
          const Span& want = spans.span(l, s, g);
          const std::string where = "step " + std::to_string(step) + " span " + std::to_string(at);
          ASSERT_EQ(state[at].num_survivors, want.num_survivors) << where;
          ASSERT_EQ(state[at].num_ring, want.num_ring) << where;
          ASSERT_EQ(state[at].ring_start, want.ring_start) << where;
          ASSERT_EQ(state[at].num_tokens, want.num_tokens) << where;
          const int32_t* own_survivors = &survivors[at * static_cast<size_t>(d.max_survivor_pages)];
          const int32_t* own_ring = ring.data() + at * static_cast<size_t>(d.ring_pages_per_span());
          held.insert(held.end(), own_survivors, own_survivors + want.survivors.num_pages);
          held.insert(held.end(), own_ring, own_ring + want.ring.num_pages);
          if (want.num_tokens == 0) continue;
          ASSERT_EQ(std::memcmp(&newest[at * static_cast<size_t>(d.newest_stride())], want.newest,
                                token_bytes),
                    0)
              << where;
          const uint8_t* own_flags = &flags[at * static_cast<size_t>(d.evict_stride())];
          if (c.window > 0) {
            ASSERT_EQ(std::memcmp(own_flags, want.ring_evict, static_cast<size_t>(want.num_ring)),
                      0)
                << where;
            ASSERT_EQ(own_flags[c.window], want.newest_evict) << where;
          }
          std::vector<uint8_t> a(token_bytes), b(token_bytes);
          const auto compare = [&](const PageTable& table, const int32_t* ids, int n) {
            for (int t = 0; t < n; ++t) {
              CopyPageToRow(c.format, c.head_dim, layout.Page(table.At(t / slots)), t % slots,
                            a.data());
              CopyPageToRow(c.format, c.head_dim,
                            &pages[static_cast<size_t>(ids[t / slots]) * layout.page_bytes],
                            t % slots, b.data());
              ASSERT_EQ(a, b) << where << " slot " << t;
            }
          };
          compare(want.survivors, own_survivors, want.num_survivors);
          compare(want.ring, own_ring, want.num_ring);
        }
      }
    }
    std::sort(held.begin(), held.end());
    ASSERT_EQ(held.size(), static_cast<size_t>(num_pages));
    for (int i = 0; i < num_pages; ++i) ASSERT_EQ(held[static_cast<size_t>(i)], i);
  }
  EXPECT_EQ(exhausted.Get()[0], 0);

  // Everything given back: the list holds every page again.
  std::vector<int32_t> all(seqs);
  for (size_t s = 0; s < seqs; ++s) all[s] = static_cast<int32_t>(s);
  DeviceArray<int32_t> device_all(all);
  const absl::Status status = LaunchReleaseSequences({.spans = spans.device(),
                                                      .pool = pool,
                                                      .slots = device_all.get(),
                                                      .num_seqs = c.num_sequences},
                                                     nullptr);
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_EQ(num_free.Get()[0], num_pages);
  std::vector<int32_t> given = free_pages.Get();
  std::sort(given.begin(), given.end());
  for (int i = 0; i < num_pages; ++i) ASSERT_EQ(given[static_cast<size_t>(i)], i);
  for (const SpanState& s : spans.state->Get()) ASSERT_EQ(s.num_tokens, 0);
}

// Steps past the end of the pool, release, steps again. All arrays are guarded; after each
// launch the free list and the tables hold every page exactly once.
class DecodeStepShortage : public testing::TestWithParam<uint32_t> {
 protected:
  void SetUp() override { RequireGpu(); }
};

TEST_P(DecodeStepShortage, LeavesListAndTablesWhole) {
  constexpr int kLayers = 3, kSequences = 5, kHeads = 4, kSlots = 32, kMaxSurvivors = 128;
  std::mt19937 rng(GetParam());
  const int window = GetParam() % 3 == 0 ? 0 : 40;
  const int num_pages = 60 + static_cast<int>(rng() % 150);
  constexpr int kSpans = kLayers * kSequences * kHeads;
  DeviceSpanCase spans({.head_dim = 64,
                        .window = window,
                        .num_layers = kLayers,
                        .num_kv_heads = kHeads,
                        .spare_pages = num_pages,
                        .max_survivors = kMaxSurvivors,
                        .seed = GetParam()},
                       kSequences, std::vector<SpanLength>(kSpans));
  spans.state->Set(std::vector<SpanState>(kSpans));
  const size_t flags_a_span = static_cast<size_t>(window) + 1;
  std::vector<uint8_t> flags(kSpans * flags_a_span);
  for (uint8_t& f : flags) f = rng() % 4 == 0;
  spans.ring_evict->Set(flags);
  DeviceArray<int32_t> free_pages(spans.spare_pages()), num_free(std::vector<int32_t>{num_pages}),
      exhausted(std::vector<int32_t>{0}), slots(std::vector<int32_t>{3, -1, 0, 4, 1});
  DecodeStepParams params{.spans = spans.device(),
                          .pool = {free_pages.get(), num_free.get(), exhausted.get()},
                          .slots = slots.get(),
                          .num_seqs = kSequences};
  const DeviceSpans& d = params.spans;
  // Whether each page is in the list or in one table; the counters of all spans.
  const auto check = [&](const std::string& where) {
    std::vector<SpanState> states = spans.state->Get();
    const std::vector<int32_t> survivors = spans.survivor_pages->Get();
    const std::vector<int32_t> ring = spans.ring_pages->Get();
    std::vector<int32_t> held = free_pages.Get();
    const int32_t left = num_free.Get()[0];
    EXPECT_GE(left, 0) << where;
    EXPECT_LE(left, num_pages) << where;
    held.resize(static_cast<size_t>(std::clamp(left, 0, num_pages)));
    for (size_t i = 0; i < states.size(); ++i) {
      const auto add = [&](const std::vector<int32_t>& table, int stride, int tokens) {
        for (int j = 0; j < (tokens + kSlots - 1) / kSlots; ++j) {
          held.push_back(table[i * static_cast<size_t>(stride) + static_cast<size_t>(j)]);
        }
      };
      add(survivors, d.max_survivor_pages, states[i].num_survivors);
      add(ring, d.ring_pages_per_span(), states[i].num_ring);
    }
    std::sort(held.begin(), held.end());
    std::vector<int32_t> all(static_cast<size_t>(num_pages));
    for (int i = 0; i < num_pages; ++i) all[static_cast<size_t>(i)] = i;
    EXPECT_EQ(held, all) << where;
    return states;
  };
  for (int round = 0; round < 3; ++round) {
    exhausted.Set({0});
    bool advanced = true;
    for (int step = 0; step < 400 && exhausted.Get()[0] == 0; ++step) {
      ASSERT_TRUE(LaunchDecodeStep(params, nullptr).ok());
      const std::vector<SpanState> states = check("step " + std::to_string(step));
      for (size_t i = 0; i < states.size(); ++i) {
        const bool present = i / kHeads % kSequences != 2;
        advanced &= states[i].num_tokens == (present ? step + 1 : 0);
      }
      EXPECT_NE(advanced, exhausted.Get()[0] == 1);
    }
    ASSERT_EQ(exhausted.Get()[0], 1);
    for (int more = 0; more < 3; ++more) {  // still without pages
      ASSERT_TRUE(LaunchDecodeStep(params, nullptr).ok());
      check("after the end");
    }
    ASSERT_TRUE(LaunchReleaseSequences(params, nullptr).ok());
    for (const SpanState& s : check("released")) EXPECT_EQ(s.num_tokens, 0);
    EXPECT_EQ(num_free.Get()[0], num_pages);
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, DecodeStepShortage, testing::Range(1u, 9u));

TEST(DecodeStepGpu, ASpanWhoseTableIsFullStays) {
  RequireGpu();
  if (testing::Test::IsSkipped()) return;
  DeviceSpanCase spans({.head_dim = 64, .window = 0, .num_kv_heads = 2, .spare_pages = 2}, 1,
                       {{256, 0}, {31, 0}});
  ASSERT_EQ(spans.max_survivor_pages(), 16);
  DeviceArray<int32_t> free_pages(spans.spare_pages()), num_free(std::vector<int32_t>{2}),
      exhausted(std::vector<int32_t>{0}), slots(std::vector<int32_t>{0});
  DecodeStepParams params{.spans = spans.device(),
                          .pool = {free_pages.get(), num_free.get(), exhausted.get()},
                          .slots = slots.get(),
                          .num_seqs = 1};
  params.spans.max_survivor_pages = 8;  // of the first span alone: full
  ASSERT_TRUE(LaunchDecodeStep(params, nullptr).ok());
  EXPECT_EQ(exhausted.Get()[0], 1);
  EXPECT_EQ(num_free.Get()[0], 2);
  const std::vector<SpanState> states = spans.state->Get();
  EXPECT_EQ(states[0].num_survivors, 256);
  EXPECT_EQ(states[0].num_tokens, 257);
  EXPECT_EQ(states[1].num_survivors, 32);
  EXPECT_EQ(states[1].num_tokens, 33);
}

// What is looked at before anything is enqueued; needs no device.
TEST(DecodePrepareParams, RefusesWhatItCannotDo) {
  alignas(16) static uint8_t memory[16];
  auto* ints = reinterpret_cast<int32_t*>(memory);
  auto* floats = reinterpret_cast<float*>(memory);
  DecodePrepareCudaParams good;
  DmsCompactParams& c = good.compact;
  c.q = c.k = c.v = c.rope_cos = c.rope_sin = floats;
  c.q_stride = c.k_stride = c.v_stride = 640;
  c.positions = good.slots = ints;
  c.q_out = floats + 1;
  c.num_tokens = 1;
  c.num_heads = 6;
  c.num_kv_heads = 2;
  c.head_dim = 64;
  c.format = KvFormatId::kFp8;
  good.spans = ValidDeviceSpans(memory);
  ASSERT_TRUE(ValidateDecodePrepare(good).ok()) << ValidateDecodePrepare(good);
  const auto refused = [&](auto change) {
    DecodePrepareCudaParams p = good;
    change(p);
    return ValidateDecodePrepare(p).code() == absl::StatusCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused([](auto& p) { p.compact.num_tokens = -1; }));
  EXPECT_TRUE(refused([](auto& p) { p.compact.num_heads = 5; }));
  EXPECT_TRUE(refused([](auto& p) { p.compact.q_stride = 383; }));
  EXPECT_TRUE(refused([](auto& p) { p.compact.v_stride = 127; }));
  EXPECT_TRUE(refused([](auto& p) { p.compact.q_out = nullptr; }));
  EXPECT_TRUE(refused([&](auto& p) { p.compact.q_out = floats; }));
  EXPECT_TRUE(refused([](auto& p) { p.compact.format = KvFormatId::kInt8; }));
  EXPECT_TRUE(refused([](auto& p) { p.compact.rule.source = DecisionSource::kLogits; }));
  EXPECT_TRUE(refused([](auto& p) { p.layer = 1; }));
  EXPECT_TRUE(refused([](auto& p) { p.slots = nullptr; }));
}

std::vector<PrepareCase> Cases() {
  std::vector<PrepareCase> cases;
  for (const KvFormat& format : kKvFormats) {
    for (const int dim : {64, 128}) {
      cases.push_back({.name = std::string(format.name) + "_d" + std::to_string(dim),
                       .format = format.id,
                       .head_dim = dim});
    }
  }
  cases.push_back({.name = "shift0_w1", .window = 1, .shift = 0});
  cases.push_back({.name = "w1", .window = 1, .shift = 1});
  cases.push_back({.name = "w40_llama",
                   .head_dim = 64,
                   .group = 4,
                   .window = 40,
                   .shift = 0,
                   .rule = {.source = DecisionSource::kBorrowedBeforeQNorm,
                            .zeroing = ChannelZeroing::kBeforeAndAfterRope,
                            .scale = 3.0f,
                            .offset = 0.5f},
                   .norm = false});
  cases.push_back({.name = "per_layer_zeroed",
                   .group = 3,
                   .num_kv_heads = 3,
                   .rule = {.source = DecisionSource::kBorrowedAfterQNorm,
                            .zeroing = ChannelZeroing::kBeforeRope,
                            .scale = 1.0f,
                            .offset = 0.0f,
                            .per_layer = true,
                            .round_to_bf16 = false}});
  cases.push_back({.name = "logits",
                   .head_dim = 64,
                   .group = 1,
                   .window = 12,
                   .rule = {.source = DecisionSource::kLogits, .scale = 1.0f, .offset = 0.2f}});
  cases.push_back({.name = "keep_all", .group = 8, .rule = {.source = DecisionSource::kNone}});
  cases.push_back({.name = "dense", .window = 0, .rule = {.source = DecisionSource::kNone}});
  return cases;
}

std::vector<PrepareCase> RandomCases() {
  RandomShapes shapes(3);
  std::vector<PrepareCase> cases;
  for (int i = 0; i < 12; ++i) {
    PrepareCase c{.name = "number_" + std::to_string(i),
                  .format = shapes.Format(),
                  .head_dim = shapes.HeadDim(),
                  .group = shapes.In(1, 8),
                  .num_kv_heads = shapes.In(1, 8),
                  .window = shapes.OneIn(2) ? shapes.In(0, 40) : shapes.Window(),
                  .shift = shapes.In(0, 1),
                  .rule = shapes.Rule(),
                  .norm = !shapes.OneIn(4),
                  .num_layers = shapes.In(1, 3),
                  .num_sequences = shapes.Log(1, 12),
                  .num_steps = shapes.Log(2, 200)};
    if (c.window == 0) c.rule.source = DecisionSource::kNone;
    cases.push_back(c);
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, DecodePrepareGpu, testing::ValuesIn(Cases()),
                         [](const auto& c) { return c.param.name; });
INSTANTIATE_TEST_SUITE_P(Random, DecodePrepareGpu, testing::ValuesIn(RandomCases()),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::kernels
