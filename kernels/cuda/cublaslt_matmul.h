#pragma once

#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/base/bf16.h"
#include "common/cuda/stream_handle.h"

struct cublasLtContext;  // what cublasLtHandle_t points to

// Products by cuBLASLt, weights in the orientation of gemm.h:
//   out[i, j] (+)= sx[i] * sw[j] * sum_k x[i, k] * w[j, k]
// summed in float; by e4m3 the tensor cores keep some 14 bits of a partial sum.
// The order of the sum is cuBLASLt's and depends on m: a row's bits are the same for the same m
// and shape, not across them.
namespace winnow::kernels {

enum class MatmulType : uint8_t { kBf16, kE4m3 };  // of x and w
// Of kE4m3's scales: one for x and one for w, or one a row of x and one a row of w.
enum class MatmulScales : uint8_t { kPerTensor, kPerRow };

// All pointers are device pointers.
struct MatmulParams {
  const void* x = nullptr;         // [m, k], row stride ldx; 16-byte aligned
  const void* w = nullptr;         // [n, k] contiguous; 16-byte aligned
  const float* x_scale = nullptr;  // kE4m3 alone: [1] or [m]
  const float* w_scale = nullptr;  // kE4m3 alone: [1] or [n]
  // Exactly one is set: [m, n], row stride ldo, 16-byte aligned; must not overlap an input.
  float* out_f32 = nullptr;
  Bf16* out_bf16 = nullptr;
  void* workspace = nullptr;  // the caller's, 256-byte aligned; not shared by products under way
  size_t workspace_bytes = 0;
  int m = 0, n = 0, k = 0;   // m >= 0, 0 does nothing; n, k >= 1. kE4m3: n, k multiples of 16
  int64_t ldx = 0, ldo = 0;  // elements; rows of x, w and out begin 16-byte aligned
  MatmulType type = MatmulType::kBf16;
  MatmulScales scales = MatmulScales::kPerTensor;
  // Add to what out_f32 holds. (To out_bf16 cuBLASLt would add a product rounded before.)
  bool accumulate = false;
};

// Enough for cuBLASLt's best kernels on Hopper; less is allowed.
inline constexpr size_t kMatmulWorkspaceBytes = size_t{32} << 20;

// INVALID_ARGUMENT for a null or misaligned pointer or a bad shape.
absl::Status ValidateMatmul(const MatmulParams& params);

// A cuBLASLt handle and the plans of the shapes it has seen: at most kMaxPlans, the least
// recently used makes room. Not thread-safe: owned by one thread, of the device that was current
// when it was made.
class CublasLt {
 public:
  static constexpr size_t kMaxPlans = 512;

  static absl::StatusOr<std::unique_ptr<CublasLt>> Create();
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;
  CublasLt& operator=(const CublasLt&) = delete;

  // Enqueues on `stream`; never synchronizes, and allocates no device memory, so it can be
  // captured in a CUDA graph. The first product of a shape asks cuBLASLt's heuristics, tens of
  // microseconds. UNIMPLEMENTED where cuBLASLt has no kernel for the shape and workspace.
  absl::Status Launch(const MatmulParams& params, StreamHandle stream);
  size_t num_plans() const { return plans_.size(); }

 private:
  struct Key {
    int m, n, k;
    int64_t ldx, ldo;
    size_t workspace_bytes;
    MatmulType type;
    MatmulScales scales;
    bool bf16_out, accumulate;
    uint32_t alignment;  // bytes, a power of two: of x, w and out, what all have, up to 256
    auto operator<=>(const Key&) const = default;
  };
  struct Plan;
  struct Entry {
    std::unique_ptr<Plan> plan;
    uint64_t last_use;
  };

  explicit CublasLt(cublasLtContext* handle);
  absl::StatusOr<std::unique_ptr<Plan>> MakePlan(const Key& key) const;

  cublasLtContext* const handle_;
  std::map<Key, Entry> plans_;
  uint64_t num_uses_ = 0;
};

}  // namespace winnow::kernels
