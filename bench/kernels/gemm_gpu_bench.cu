// Products by large weights on the GPU: prints one JSON line a case, times in microseconds.
//
// gemv/<shape>/m<rows>: a CUDA graph of products by weights of their own, as a decode step's
// layers are, many times the L2 cache together and flushed from it before each replay. The limit
// is the weights' bytes (and scales) at this run's own read stream; the peer is cuBLASLt's best
// of the type in the same graph (FP8: W8A8 with one scale, x quantized before). `alone_us`: a
// graph of one product, `fused_us` with SiLU and product in it, `separate_us` with them after it.
// gemm/<shape>/<type>: cuBLASLt by kPrefillRows rows.
//
//   gemm_gpu_bench [PART OF A CASE'S NAME]
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bench/kernels/bench_memory.cuh"
#include "bench/kernels/fill_random.cuh"
#include "bench/kernels/read_stream.cuh"
#include "common/base/bf16.h"
#include "common/base/fp8.h"
#include "kernels/cuda/cublaslt_matmul.h"
#include "kernels/cuda/gemv.h"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/matmul_quantize.h"
#include "kernels/cuda/ptx.cuh"

namespace winnow::kernels {
namespace {

// Random values in [-1, 1).
__global__ void FillBf16(uint16_t* out, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < n; i += gridDim.x * int64_t{256}) {
    const float x =
        static_cast<float>(static_cast<int32_t>(Mix(static_cast<uint64_t>(i)))) * 0x1p-31f;
    out[i] = static_cast<uint16_t>(__float_as_uint(x) >> 16);
  }
}

// Random codes, none of them NaN.
__global__ void FillE4m3(uint8_t* out, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < n; i += gridDim.x * int64_t{256}) {
    const uint32_t code = Mix(static_cast<uint64_t>(i)) & 0xff;
    out[i] = static_cast<uint8_t>((code & 0x7f) == 0x7f ? code - 1 : code);
  }
}

__global__ void FillFloats(float* out, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{256} + threadIdx.x; i < n; i += gridDim.x * int64_t{256}) {
    out[i] = 0.01f + 0.01f * static_cast<float>(Mix(static_cast<uint64_t>(i)) & 0xff) / 256.0f;
  }
}

// What a fused epilogue spares: silu(gate) * up of [m, 2 * columns] floats.
__global__ void __launch_bounds__(256) SiluMul(const float* in, Bf16* out, int columns) {
  ptx::WaitForPredecessors();
  const int i = static_cast<int>(blockIdx.x * 256 + threadIdx.x);
  if (i >= columns) return;
  const int64_t row = blockIdx.y;
  const float gate = in[row * 2 * columns + i], up = in[(row * 2 + 1) * columns + i];
  out[row * columns + i].bits =
      static_cast<uint16_t>(ptx::PackBf16(gate / (1.0f + expf(-gate)) * up, 0.0f));
}

struct GemmShape {
  const char* name;
  int n, k;
};
constexpr GemmShape kShapes[] = {{"qwen3_8b_gate_up", 24576, 4096},
                                 {"qwen3_8b_down", 4096, 12288},
                                 {"llama_1b_gate_up", 16384, 2048}};
constexpr int kLaunches = 24, kPrefillRows = 2048, kChecked = 8;

// Random inputs of a shape, and buffers for what becomes of them.
class Products {
 public:
  Products(const GemmShape& shape, bool e4m3, CublasLt* lt, cudaStream_t stream)
      : shape_(shape),
        e4m3_(e4m3),
        lt_(lt),
        stream_(stream),
        bytes_(int64_t{shape.n} * shape.k * (e4m3 ? 1 : 2)),
        copies_(static_cast<int>(std::min<int64_t>(kLaunches, (int64_t{3} << 29) / bytes_ + 1))),
        w_(static_cast<size_t>(bytes_ * copies_)),
        x_(static_cast<size_t>(kPrefillRows) * static_cast<size_t>(shape.k)),
        x_codes_(static_cast<size_t>(kPrefillRows) * static_cast<size_t>(shape.k)),
        x_scale_(kPrefillRows),
        w_scale_(static_cast<size_t>(shape.n)),
        out_(static_cast<size_t>(kPrefillRows) * static_cast<size_t>(shape.n)),
        silu_(static_cast<size_t>(kMaxGemvRows) * static_cast<size_t>(shape.n)),
        workspace_(kMatmulWorkspaceBytes) {
    if (e4m3) {
      FillE4m3<<<4096, 256, 0, stream>>>(w_.get(), bytes_ * copies_);
    } else {
      FillBf16<<<4096, 256, 0, stream>>>(reinterpret_cast<uint16_t*>(w_.get()),
                                         bytes_ / 2 * copies_);
    }
    FillBf16<<<512, 256, 0, stream>>>(reinterpret_cast<uint16_t*>(x_.get()),
                                      int64_t{kPrefillRows} * shape.k);
    FillFloats<<<64, 256, 0, stream>>>(w_scale_.get(), shape.n);
    Check(cudaGetLastError());
    Quantize(kPrefillRows);
  }

  int64_t limit_bytes() const { return bytes_ + (e4m3_ ? 4 * shape_.n : 0); }
  int copies() const { return copies_; }

  void Gemv(int m, int copy, GemvEpilogue epilogue) {
    const bool silu = epilogue == GemvEpilogue::kSiluMul;
    Check(LaunchGemv({.x = x_.get(),
                      .w = w_.get() + bytes_ * copy,
                      .w_scale = e4m3_ ? w_scale_.get() : nullptr,
                      .out_f32 = silu ? nullptr : out_.get(),
                      .out_bf16 = silu ? silu_.get() : nullptr,
                      .m = m,
                      .n = shape_.n,
                      .k = shape_.k,
                      .ldx = shape_.k,
                      .ldo = silu ? shape_.n / 2 : shape_.n,
                      .weights = e4m3_ ? GemvWeights::kE4m3 : GemvWeights::kBf16,
                      .epilogue = epilogue},
                     stream_));
  }
  // Ends the program unless some outputs by `m` rows are what sums in double are, but for what
  // gemv.h says is lost: 2^-12 of such a sum's size, less of that of its products' magnitudes.
  void CheckGemv(int m) {
    Gemv(m, copies_ - 1, GemvEpilogue::kStore);
    Check(cudaStreamSynchronize(stream_));
    const auto k = static_cast<size_t>(shape_.k);
    std::vector<Bf16> x(k);
    std::vector<uint8_t> w(k * (e4m3_ ? 1 : 2));
    const auto get = [](auto* to, const auto* from, size_t bytes) {
      Check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
    };
    get(x.data(), x_.get() + (m - 1) * int64_t{shape_.k}, 2 * k);
    for (int i = 0; i < kChecked; ++i) {
      const int64_t j = int64_t{i} * (shape_.n - 1) / (kChecked - 1);
      float scale = 1.0f, got = 0.0f;
      get(w.data(), w_.get() + bytes_ * (copies_ - 1) + j * static_cast<int64_t>(w.size()),
          w.size());
      get(&got, out_.get() + (m - 1) * int64_t{shape_.n} + j, sizeof(float));
      if (e4m3_) get(&scale, w_scale_.get() + j, sizeof(float));
      double sum = 0, size = 0;
      for (size_t at = 0; at < k; ++at) {
        const uint16_t bf16 = e4m3_ ? 0 : static_cast<uint16_t>(w[2 * at] | w[2 * at + 1] << 8);
        const double product =
            double{ToFloat(x[at])} * double{e4m3_ ? E4m3ToFloat(w[at]) : ToFloat(Bf16{bf16})};
        sum += product;
        size += std::abs(product);
      }
      if (std::abs(got - sum * double{scale}) <= size * double{scale} * 0x1p-12) continue;
      std::fprintf(stderr, "gemv of %s: out[%d, %lld] is %g, not %g\n", shape_.name, m - 1,
                   static_cast<long long>(j), double{got}, sum * double{scale});
      std::exit(1);
    }
  }
  void Silu(int m) {
    const int columns = shape_.n / 2;
    Check(LaunchEarly(SiluMul,
                      dim3(static_cast<unsigned>((columns + 255) / 256), static_cast<unsigned>(m)),
                      256, 0, stream_, out_.get(), silu_.get(), columns));
  }
  void Matmul(int m, int copy, MatmulScales scales, bool bf16_out) {
    Check(lt_->Launch({.x = e4m3_ ? static_cast<const void*>(x_codes_.get()) : x_.get(),
                       .w = w_.get() + bytes_ * copy,
                       .x_scale = e4m3_ ? x_scale_.get() : nullptr,
                       .w_scale = e4m3_ ? w_scale_.get() : nullptr,
                       .out_f32 = bf16_out ? nullptr : out_.get(),
                       .out_bf16 = bf16_out ? reinterpret_cast<Bf16*>(out_.get()) : nullptr,
                       .workspace = workspace_.get(),
                       .workspace_bytes = kMatmulWorkspaceBytes,
                       .m = m,
                       .n = shape_.n,
                       .k = shape_.k,
                       .ldx = shape_.k,
                       .ldo = shape_.n,
                       .type = e4m3_ ? MatmulType::kE4m3 : MatmulType::kBf16,
                       .scales = scales},
                      stream_));
  }
  void Quantize(int m) {
    Check(LaunchQuantizeRows({.x = x_.get(),
                              .codes = x_codes_.get(),
                              .scale = x_scale_.get(),
                              .m = m,
                              .k = shape_.k,
                              .ldx = shape_.k},
                             stream_));
  }

 private:
  const GemmShape shape_;
  const bool e4m3_;
  CublasLt* const lt_;
  const cudaStream_t stream_;
  const int64_t bytes_;
  const int copies_;
  DeviceBuffer<uint8_t> w_;
  DeviceBuffer<Bf16> x_;
  DeviceBuffer<uint8_t> x_codes_;
  DeviceBuffer<float> x_scale_, w_scale_, out_;
  DeviceBuffer<Bf16> silu_;
  DeviceBuffer<uint8_t> workspace_;
};

// Microseconds of one of a graph's products.
template <typename F>
double EachUs(BenchTimer* timer, int copies, F launch) {
  return timer->GraphMedian([&] {
    for (int i = 0; i < kLaunches; ++i) launch(i % copies);
  }) / kLaunches;
}

void RunFew(const std::string& name, bool e4m3, bool gate_up, int m, double gbs, Products* products,
            BenchTimer* timer) {
  const int copies = products->copies();
  products->CheckGemv(m);
  const auto gemv = [&](int copy) { products->Gemv(m, copy, GemvEpilogue::kStore); };
  const double us = EachUs(timer, copies, gemv);
  const double alone = timer->GraphMedian([&] { gemv(0); });
  const double peer = EachUs(
      timer, copies, [&](int copy) { products->Matmul(m, copy, MatmulScales::kPerTensor, false); });
  const double limit = static_cast<double>(products->limit_bytes()) / gbs / 1e3;
  std::printf(
      "{\"case\": \"gemv/%s/m%d\", \"ours_us\": %.2f, \"limit_us\": %.2f, \"pct_of_limit\": %.1f, "
      "\"alone_us\": %.2f, \"peer\": \"cuBLASLt %s\", \"peer_us\": %.2f",
      name.c_str(), m, us, limit, 100.0 * limit / us, alone, e4m3 ? "W8A8, one scale" : "BF16",
      peer);
  if (e4m3) {
    std::printf(", \"peer_rows_us\": %.2f", EachUs(timer, copies, [&](int copy) {
                  products->Matmul(m, copy, MatmulScales::kPerRow, false);
                }));
  }
  if (gate_up) {
    const double fused =
        EachUs(timer, copies, [&](int copy) { products->Gemv(m, copy, GemvEpilogue::kSiluMul); });
    const double separate = EachUs(timer, copies, [&](int copy) {
      gemv(copy);
      products->Silu(m);
    });
    std::printf(", \"fused_us\": %.2f, \"separate_us\": %.2f", fused, separate);
  } else {
    std::printf(", \"add_us\": %.2f", EachUs(timer, copies, [&](int copy) {
                  products->Gemv(m, copy, GemvEpilogue::kAdd);
                }));
  }
  std::printf("}\n");
  std::fflush(stdout);
}

void RunMany(const GemmShape& shape, bool e4m3, Products* products, BenchTimer* timer) {
  const double flop = 2.0 * kPrefillRows * shape.n * shape.k;
  const auto print = [&](const char* type, double us) {
    std::printf("{\"case\": \"gemm/%s/%s\", \"ours_us\": %.2f, \"%s\": %.0f, \"tflops\": %.0f}\n",
                shape.name, type, us, e4m3 ? "flop_fp8" : "flop", flop, flop / us / 1e6);
    std::fflush(stdout);
  };
  const auto matmul = [&](MatmulScales scales) {
    return timer->GraphMedian([&] { products->Matmul(kPrefillRows, 0, scales, true); });
  };
  if (!e4m3) {
    print("bf16", matmul(MatmulScales::kPerTensor));
    return;
  }
  print("fp8_one_scale", matmul(MatmulScales::kPerTensor));
  print("fp8_row_scales", matmul(MatmulScales::kPerRow));
  print("fp8_row_scales_and_quantization", timer->GraphMedian([&] {
    products->Quantize(kPrefillRows);
    products->Matmul(kPrefillRows, 0, MatmulScales::kPerRow, true);
  }));
}

int Main(int argc, char** argv) {
  const std::string filter = argc > 1 ? argv[1] : "";
  cudaStream_t stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const double gbs = MeasureReadStream(stream);
  std::printf("{\"case\": \"read_stream\", \"gbs\": %.1f}\n", gbs);
  absl::StatusOr<std::unique_ptr<CublasLt>> lt = CublasLt::Create();
  Check(lt.status());
  BenchTimer timer(15, stream);
  for (const GemmShape& shape : kShapes) {
    const bool gate_up = shape.n > shape.k;
    for (const bool e4m3 : {false, true}) {
      Products products(shape, e4m3, lt->get(), stream);
      const std::string name = shape.name + std::string(e4m3 ? "_fp8" : "_bf16");
      for (const int m : {1, 2, 4, 8, 16}) {
        if (("gemv/" + name + "/m" + std::to_string(m)).find(filter) == std::string::npos) continue;
        RunFew(name, e4m3, gate_up, m, gbs, &products, &timer);
      }
      if ((std::string("gemm/") + shape.name).find(filter) != std::string::npos) {
        RunMany(shape, e4m3, &products, &timer);
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace winnow::kernels

int main(int argc, char** argv) { return winnow::kernels::Main(argc, argv); }
