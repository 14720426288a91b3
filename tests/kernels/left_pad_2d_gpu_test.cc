// LaunchLeftPad2d against its CPU twin.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <vector>

#include "kernels/prefill_primitives.h"
#include "tests/kernels/device_memory.h"
#include "tests/kernels/left_pad_2d_case.h"

namespace winnow::kernels {
namespace {

// `bytes` of device memory, filled with 0xcd.
class DeviceBytes {
 public:
  explicit DeviceBytes(size_t bytes) {
    EXPECT_EQ(cudaMalloc(&data_, bytes + 1), cudaSuccess);
    EXPECT_EQ(cudaMemset(data_, 0xcd, bytes + 1), cudaSuccess);
  }
  ~DeviceBytes() { cudaFree(data_); }
  DeviceBytes(const DeviceBytes&) = delete;
  DeviceBytes& operator=(const DeviceBytes&) = delete;
  uint8_t* get() const { return static_cast<uint8_t*>(data_); }

 private:
  void* data_ = nullptr;
};

class LeftPad2dGpu : public testing::TestWithParam<LeftPad2dCase> {
 protected:
  void SetUp() override { RequireGpu(); }

  static std::vector<uint8_t> Run(const LeftPad2dCase& c, const LeftPad2dInputs& x,
                                  size_t misalign) {
    DeviceBytes in(x.in.size() + misalign), lens(x.lens.size() * sizeof(int32_t)), out(x.in.size());
    EXPECT_EQ(cudaMemcpy(in.get() + misalign, x.in.data(), x.in.size(), cudaMemcpyHostToDevice),
              cudaSuccess);
    EXPECT_EQ(cudaMemcpy(lens.get(), x.lens.data(), x.lens.size() * sizeof(int32_t),
                         cudaMemcpyHostToDevice),
              cudaSuccess);
    cudaStream_t stream = nullptr;
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    const absl::Status status = LaunchLeftPad2d({.in = in.get() + misalign,
                                                 .lens = reinterpret_cast<int32_t*>(lens.get()),
                                                 .out = out.get(),
                                                 .num_rows = c.num_rows,
                                                 .seq = c.seq,
                                                 .row_bytes = c.row_bytes},
                                                stream);
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
    EXPECT_EQ(cudaStreamDestroy(stream), cudaSuccess);
    std::vector<uint8_t> result(x.in.size() + 1);
    EXPECT_EQ(cudaMemcpy(result.data(), out.get(), result.size(), cudaMemcpyDeviceToHost),
              cudaSuccess);
    EXPECT_EQ(result.back(), 0xcd);  // nothing past the end
    result.pop_back();
    return result;
  }
};

TEST_P(LeftPad2dGpu, EqualsTheCpu) {
  const LeftPad2dCase& c = GetParam();
  const LeftPad2dInputs x(c);
  std::vector<uint8_t> want(x.in.size());
  want.reserve(1);  // an empty case still has an address
  ASSERT_TRUE(
      LeftPad2dCpu({x.in.data(), x.lens.data(), want.data(), c.num_rows, c.seq, c.row_bytes}).ok());
  EXPECT_EQ(Run(c, x, /*misalign=*/0), want);
  EXPECT_EQ(Run(c, x, /*misalign=*/1), want);  // the byte-wise path
}

TEST_P(LeftPad2dGpu, LengthsAreClamped) {
  const LeftPad2dCase& c = GetParam();
  LeftPad2dInputs x(c);
  if (x.lens.empty()) return;
  LeftPad2dInputs clamped(c);
  x.lens.front() = c.seq + 1000;
  clamped.lens.front() = c.seq;
  x.lens.back() = c.num_rows > 1 ? -5 : x.lens.back();
  clamped.lens.back() = c.num_rows > 1 ? 0 : clamped.lens.back();
  EXPECT_EQ(Run(c, x, 0), Run(c, clamped, 0));
}

INSTANTIATE_TEST_SUITE_P(All, LeftPad2dGpu, testing::ValuesIn(kLeftPad2dCases),
                         [](const auto& c) { return std::string(c.param.name); });

}  // namespace
}  // namespace winnow::kernels
