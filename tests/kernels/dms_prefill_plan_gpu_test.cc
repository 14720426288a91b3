// The order in which LaunchDmsPrefillCompact() leaves the tiles for the attention.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "kernels/cuda/dms_prefill.h"
#include "kernels/cuda/dms_prefill_plan.cuh"
#include "tests/kernels/device_memory.h"

namespace winnow::kernels {
namespace {

constexpr int kHeads = 9, kGroup = 2, kDim = 64, kWindow = 100;

struct Sequence {
  int prefix, chunk, older;  // survivors older than the prefix, of head 0; of others one more each
};

// More tiles of one sequence than a block takes at once, empty chunks, and more sequences
// than warps.
std::vector<Sequence> Sequences() {
  std::vector<Sequence> sequences = {{0, 70001, 0}, {0, 0, 0}, {100, 0, 7}, {100, 3000, 5}};
  for (int i = 0; i < 37; ++i) sequences.push_back({i, 1 + 97 * i, i});
  return sequences;
}

// With `k_and_v`, by the block of the kernel that stores; else of that which lays out.
void ExpectPlan(bool k_and_v) {
  std::mt19937 rng(3);
  const std::vector<Sequence> sequences = Sequences();
  std::vector<DmsPrefillSequence> places;
  std::vector<int32_t> older;
  DmsPrefillBatch batch{.batch = static_cast<int>(sequences.size()),
                        .num_kv_heads = kHeads,
                        .group = kGroup,
                        .head_dim = kDim,
                        .window = kWindow,
                        .shift = 0};
  for (const Sequence& s : sequences) {
    places.push_back({batch.num_rows, s.chunk, batch.band_rows, s.prefix, batch.compact_rows});
    for (int head = 0; head < kHeads; ++head) older.push_back(s.older + head);
    batch.num_rows += s.chunk;
    batch.band_rows += s.prefix + s.chunk + 8;
    batch.compact_rows += s.older + kHeads + s.prefix + s.chunk + 8;
    batch.max_band = std::max(batch.max_band, s.prefix + s.chunk);
  }
  const auto bits = [&](int rows) {
    std::vector<uint8_t> evict(static_cast<size_t>(rows) * kHeads);
    for (uint8_t& x : evict) x = rng() % 4 != 0;
    return evict;
  };
  const std::vector<uint8_t> evict = bits(batch.num_rows), prefix_evict = bits(batch.band_rows);
  constexpr size_t kRow = size_t{kHeads} * kDim;
  const size_t band = static_cast<size_t>(batch.band_rows) * kRow;
  const size_t compact = static_cast<size_t>(batch.compact_rows) * kRow;
  DeviceArray<Bf16> k(static_cast<size_t>(batch.num_rows) * kRow);
  k.Fill(0);
  const DeviceArray<Bf16> band_k(band), band_v(band), compact_k(compact), compact_v(compact);
  const DeviceArray<DmsPrefillSequence> device_places(places);
  const DeviceArray<int32_t> device_older(older);
  const DeviceArray<uint8_t> device_evict(evict), device_prefix_evict(prefix_evict);
  batch.sequences = device_places.get();
  batch.num_survivors = device_older.get();
  batch.band_k = band_k.get();
  batch.band_v = band_v.get();
  batch.compact_k = compact_k.get();
  batch.compact_v = compact_v.get();
  const DeviceArray<uint8_t> scratch(DmsPrefillScratchBytes(batch));
  batch.scratch = scratch.get();
  const absl::Status status = LaunchDmsPrefillCompact({.batch = batch,
                                                       .k = k_and_v ? k.get() : nullptr,
                                                       .v = k_and_v ? k.get() : nullptr,
                                                       .kv_stride = kRow,
                                                       .decisions = device_evict.get(),
                                                       .prefix_evict = device_prefix_evict.get()},
                                                      nullptr);
  ASSERT_TRUE(status.ok()) << status;
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);

  using Tile = std::tuple<int, int, int, int>;
  const int positions = internal::TilePositions(kDim, kGroup);
  std::set<Tile> want;
  for (int n = 0; n < batch.batch; ++n) {
    const DmsPrefillSequence& s = places[static_cast<size_t>(n)];
    for (int head = 0; head < kHeads; ++head) {
      int count = older[static_cast<size_t>(n * kHeads + head)], counted = 0;
      for (int first = 0; first < s.num_tokens; first += positions) {
        for (; counted < s.num_prefix + first - kWindow; ++counted) {
          const bool chunk = counted >= s.num_prefix;
          const int row = chunk ? s.row + counted - s.num_prefix : s.band_row + counted;
          count += (chunk ? evict : prefix_evict)[static_cast<size_t>(row * kHeads + head)] == 0;
        }
        want.insert({n, head, first, count});
      }
    }
  }
  const std::vector<uint8_t> bytes = scratch.Get();
  const internal::PrefillScratch at = internal::ScratchOf(batch);
  const auto offset = [&](const void* p) {
    return static_cast<size_t>(static_cast<const uint8_t*>(p) - scratch.get());
  };
  int32_t num_tiles = 0;
  std::memcpy(&num_tiles, &bytes[offset(at.num_tiles)], sizeof(num_tiles));
  ASSERT_EQ(static_cast<size_t>(num_tiles), want.size());
  std::vector<internal::PrefillTile> tiles(want.size());
  std::memcpy(tiles.data(), &bytes[offset(at.tiles)], tiles.size() * sizeof(tiles[0]));
  std::set<Tile> got;
  int last = 1 << 30, wrong_order = 0;
  for (const internal::PrefillTile& tile : tiles) {
    got.insert({tile.sequence, tile.head, tile.first, tile.num_survivors});
    if (tile.sequence < 0 || tile.sequence >= batch.batch) continue;
    const int before = places[static_cast<size_t>(tile.sequence)].num_prefix + tile.first;
    const int boxes = (tile.num_survivors + std::min(kWindow, before) + positions) / 128;
    wrong_order += boxes > last;
    last = boxes;
  }
  EXPECT_EQ(wrong_order, 0);
  EXPECT_TRUE(got == want);
}

TEST(DmsPrefillPlan, HasEachTileOnceLongestFirst) {
  RequireGpu();
  if (testing::Test::IsSkipped() || testing::Test::HasFailure()) return;
  for (const bool k_and_v : {true, false}) {
    SCOPED_TRACE(k_and_v ? "store" : "lay out");
    ExpectPlan(k_and_v);
  }
}

}  // namespace
}  // namespace winnow::kernels
