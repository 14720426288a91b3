#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <initializer_list>
#include <random>

#include "kernels/dms_compact.h"
#include "kernels/kv_format.h"

namespace winnow::kernels {

// Shapes for the suites called Random: the same for the same seed, which WINNOW_TEST_SEED names
// (default 1), so that others can be tried without a build.
class RandomShapes {
 public:
  explicit RandomShapes(uint32_t suite) {
    const char* seed = std::getenv("WINNOW_TEST_SEED");
    std::seed_seq both{seed == nullptr ? 1u : static_cast<uint32_t>(std::atoi(seed)), suite};
    rng_.seed(both);
  }

  bool OneIn(int n) { return In(1, n) == 1; }
  int Of(std::initializer_list<int> of) {
    return of.begin()[In(0, static_cast<int>(of.size()) - 1)];
  }
  int In(int least, int most) {
    return least + static_cast<int>(rng_() % static_cast<uint32_t>(most - least + 1));
  }
  // Each octave alike; least >= 1.
  int Log(int least, int most) {
    const double octaves = std::log2((most + 1.0) / least) * (rng_() / 4294967296.0);
    return std::clamp(static_cast<int>(least * std::exp2(octaves)), least, most);
  }

  int HeadDim() { return Of({64, 128}); }
  KvFormatId Format() {
    return static_cast<KvFormatId>(In(0, static_cast<int>(std::size(kKvFormats)) - 1));
  }
  int Window() {
    return Of({1,   2,   3,   7,   8,    31,   32,   33,        63,         64,         65,
               255, 256, 257, 512, 1000, 1023, 1024, In(1, 64), In(1, 300), In(1, 1024)});
  }
  // How often a head evicts: trained ones keep 0.3 to 60 % of the tokens.
  double EvictRate() {
    return Of({0, 50, 400, 650, 875, 875, 990, 997, 1000, In(0, 1000)}) / 1000.0;
  }
  // Decides either way on numbers around 0.
  DecisionRule Rule() {
    return {.source = static_cast<DecisionSource>(In(0, 3)),
            .zeroing = static_cast<ChannelZeroing>(In(0, 2)),
            .scale = static_cast<float>(Of({1, 3, 100, -1})),
            .offset = 0.1f * static_cast<float>(Of({0, 1, 5, -2})),
            .per_layer = OneIn(4),
            .round_to_bf16 = !OneIn(4)};
  }

 private:
  std::mt19937 rng_;
};

}  // namespace winnow::kernels
