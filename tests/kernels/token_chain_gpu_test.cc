// Kernels of a decode step behind each other, each of which may start before the one ahead of it
// has ended: the bits are those of the same launches with a wait of the host between each. A wait
// for the predecessors that is lost reads what is not there yet, which is NaN.
#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "common/base/fp8.h"
#include "kernels/cuda/gemv.h"
#include "kernels/cuda/rms_norm.h"
#include "kernels/cuda/swiglu.h"
#include "tests/kernels/device_memory.h"

namespace winnow::kernels {
namespace {

constexpr int kRepeats = 20;
constexpr int kRows = 2048;  // of the first norm, which takes long: its last rows go on
constexpr int kHidden = 64, kColumns = 1024;  // of up's output and of the residual

size_t Size(int n) { return static_cast<size_t>(n); }

std::vector<float> Random(size_t n, unsigned seed) {
  std::mt19937 rng(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> values(n);
  for (float& v : values) v = uniform(rng);
  return values;
}

struct ChainCase {
  std::string name;
  GemvWeights weights = GemvWeights::kBf16;
  int m = 1;
  int k = 4096;  // columns of the first norm
  friend void PrintTo(const ChainCase& c, std::ostream* os) { *os << c.name; }
};

// A weight matrix and its scales.
class Weights {
 public:
  Weights(GemvWeights type, int n, int k, unsigned seed)
      : type_(type),
        n_(n),
        k_(k),
        bytes_(Bytes(type, Size(n) * Size(k), seed)),
        scale_(std::vector<float>(Size(n), 1.0f)) {}

  // A product by it, of x [m, k] whose rows are contiguous.
  GemvParams Of(const Bf16* x, int m, GemvEpilogue epilogue) const {
    return {.x = x,
            .w = bytes_.get(),
            .w_scale = type_ == GemvWeights::kE4m3 ? scale_.get() : nullptr,
            .m = m,
            .n = n_,
            .k = k_,
            .ldx = k_,
            .ldo = epilogue == GemvEpilogue::kSiluMul ? n_ / 2 : n_,
            .weights = type_,
            .epilogue = epilogue};
  }

 private:
  static std::vector<uint8_t> Bytes(GemvWeights type, size_t n, unsigned seed) {
    const bool e4m3 = type == GemvWeights::kE4m3;
    std::vector<uint8_t> bytes(n * (e4m3 ? 1 : 2));
    const std::vector<float> values = Random(n, seed);
    for (size_t i = 0; i < n; ++i) {
      const Bf16 bf16 = ToBf16(values[i]);
      if (e4m3) {
        bytes[i] = ToE4m3(values[i]);
      } else {
        std::memcpy(&bytes[2 * i], &bf16, 2);
      }
    }
    return bytes;
  }

  const GemvWeights type_;
  const int n_, k_;
  const DeviceArray<uint8_t> bytes_;
  const DeviceArray<float> scale_;
};

// What a run of the chain leaves.
struct ChainResult {
  std::vector<Bf16> hidden, next, last;
  std::vector<float> residual;
};

// Every product is of few tiles, so that most SMs are free for what is behind it, which would
// then read at once:
//   norm (many rows) -> up: hidden = silu-mul -> down: residual += hidden * w
//   -> wide: residual += norm * w (the one before is still adding) -> norm of residual
//   -> gate: a product in float -> SwiGLU of it
class Chain {
 public:
  explicit Chain(const ChainCase& c)
      : m_(c.m),
        k_(c.k),
        up_(c.weights, 2 * kHidden, c.k, 1),
        down_(c.weights, kColumns, kHidden, 2),
        wide_(c.weights, kColumns, c.k, 3),
        gate_(c.weights, 2 * kHidden, kColumns, 4),
        x_(Random(Size(kRows + kRepeats) * Size(c.k), 5)),
        old_(Random(Size(c.m + kRepeats) * kColumns, 6)),
        norm_weight_(std::vector<float>(Size(c.k), 0.02f)),
        norm_(Size(kRows) * Size(c.k)),
        hidden_(Size(c.m) * kHidden),
        next_(Size(c.m) * kColumns),
        last_(Size(c.m) * kHidden),
        residual_(Size(c.m) * kColumns),
        product_(Size(c.m) * 2 * kHidden) {
    EXPECT_EQ(cudaStreamCreate(&stream_), cudaSuccess);
  }
  ~Chain() { cudaStreamDestroy(stream_); }
  Chain(const Chain&) = delete;
  Chain& operator=(const Chain&) = delete;

  // Repeat `repeat`, on data of its own, with the host's waits between the launches.
  ChainResult RunApart(int repeat) {
    Reset(repeat);
    Enqueue(repeat, [this] { EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess); });
    return Results();
  }

  ChainResult Run(int repeat) {
    Reset(repeat);
    Enqueue(repeat, [] {});
    return Results();
  }

  ChainResult RunGraph(int repeat) {
    Reset(repeat);
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    EXPECT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    Enqueue(repeat, [] {});
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
    EXPECT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    EXPECT_EQ(cudaGraphLaunch(exec, stream_), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    EXPECT_EQ(cudaGraphExecDestroy(exec), cudaSuccess);
    EXPECT_EQ(cudaGraphDestroy(graph), cudaSuccess);
    return Results();
  }

 private:
  // All that the chain writes is NaN first, but for the residual, which it adds to.
  void Reset(int repeat) {
    for (DeviceArray<Bf16>* array : {&norm_, &hidden_, &next_, &last_}) array->Fill(0xff);
    product_.Fill(0xff);
    EXPECT_EQ(cudaMemcpy(residual_.get(), old_.get() + repeat * kColumns,
                         residual_.size() * sizeof(float), cudaMemcpyDeviceToDevice),
              cudaSuccess);
    // Copies and fills on the device may still be under way.
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }

  void Enqueue(int repeat, const std::function<void()>& between) {
    const auto done = [&](const absl::Status& status) {
      EXPECT_TRUE(status.ok()) << status;
      between();
    };
    done(LaunchRmsNorm({.x = x_.get() + int64_t{repeat} * k_,
                        .weight = norm_weight_.get(),
                        .out_bf16 = norm_.get(),
                        .m = kRows,
                        .n = k_,
                        .ldx = k_,
                        .eps = 1e-6f},
                       stream_));
    const Bf16* const x = norm_.get() + int64_t{kRows - m_} * k_;
    GemvParams up = up_.Of(x, m_, GemvEpilogue::kSiluMul);
    up.out_bf16 = hidden_.get();
    done(LaunchGemv(up, stream_));
    GemvParams down = down_.Of(hidden_.get(), m_, GemvEpilogue::kAdd);
    down.out_f32 = residual_.get();
    done(LaunchGemv(down, stream_));
    GemvParams wide = wide_.Of(x, m_, GemvEpilogue::kAdd);
    wide.out_f32 = residual_.get();
    done(LaunchGemv(wide, stream_));
    done(LaunchRmsNorm({.x = residual_.get(),
                        .weight = norm_weight_.get(),
                        .out_bf16 = next_.get(),
                        .m = m_,
                        .n = kColumns,
                        .ldx = kColumns,
                        .eps = 1e-6f},
                       stream_));
    GemvParams gate = gate_.Of(next_.get(), m_, GemvEpilogue::kStore);
    gate.out_f32 = product_.get();
    done(LaunchGemv(gate, stream_));
    done(LaunchSwiGlu({.x_f32 = product_.get(),
                       .out_bf16 = last_.get(),
                       .m = m_,
                       .intermediate = kHidden,
                       .ldx = 2 * kHidden},
                      stream_));
  }

  ChainResult Results() {
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    return {.hidden = hidden_.Get(),
            .next = next_.Get(),
            .last = last_.Get(),
            .residual = residual_.Get()};
  }

  const int m_, k_;
  const Weights up_, down_, wide_, gate_;
  const DeviceArray<float> x_, old_, norm_weight_;
  DeviceArray<Bf16> norm_, hidden_, next_, last_;
  DeviceArray<float> residual_, product_;
  cudaStream_t stream_ = nullptr;
};

template <typename T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

void ExpectSame(const ChainResult& got, const ChainResult& want, const std::string& what) {
  EXPECT_TRUE(SameBits(got.hidden, want.hidden)) << what << ": up";
  EXPECT_TRUE(SameBits(got.residual, want.residual)) << what << ": residual";
  EXPECT_TRUE(SameBits(got.next, want.next)) << what << ": norm of the residual";
  EXPECT_TRUE(SameBits(got.last, want.last)) << what << ": SwiGLU";
}

class TokenChainGpu : public testing::TestWithParam<ChainCase> {
 protected:
  void SetUp() override { RequireGpu(); }
};

TEST_P(TokenChainGpu, HasTheBitsOfLaunchesApart) {
  Chain chain(GetParam());
  std::vector<ChainResult> want;
  for (int i = 0; i < kRepeats; ++i) {
    want.push_back(chain.RunApart(i));
    const ChainResult& result = want.back();
    for (const float v : result.residual) ASSERT_TRUE(std::isfinite(v));
    for (const Bf16 v : result.last) ASSERT_TRUE(std::isfinite(ToFloat(v)));
    if (i > 0) {  // the data are fresh: what one repeat left cannot pass for another's
      ASSERT_FALSE(SameBits(result.hidden, want[Size(i - 1)].hidden));
      ASSERT_FALSE(SameBits(result.residual, want[Size(i - 1)].residual));
      ASSERT_FALSE(SameBits(result.last, want[Size(i - 1)].last));
    }
  }
  for (int i = 0; i < kRepeats; ++i) {
    const std::string repeat = " " + std::to_string(i);
    ExpectSame(chain.Run(i), want[Size(i)], "stream" + repeat);
    ExpectSame(chain.RunGraph(i), want[Size(i)], "graph" + repeat);
    if (HasFailure()) return;
  }
}

// k8192, and k4096 of e4m3 with m16: a sum is a cluster's.
INSTANTIATE_TEST_SUITE_P(All, TokenChainGpu,
                         testing::Values(ChainCase{"bf16_m1", GemvWeights::kBf16, 1},
                                         ChainCase{"bf16_m16", GemvWeights::kBf16, 16},
                                         ChainCase{"bf16_m16_k8192", GemvWeights::kBf16, 16, 8192},
                                         ChainCase{"e4m3_m1", GemvWeights::kE4m3, 1},
                                         ChainCase{"e4m3_m16", GemvWeights::kE4m3, 16},
                                         ChainCase{"e4m3_m16_k8192", GemvWeights::kE4m3, 16, 8192}),
                         [](const auto& c) { return c.param.name; });

}  // namespace
}  // namespace winnow::kernels
