#include "kernels/cuda/cublaslt_matmul.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"
#include "common/cuda/cuda_status.h"

namespace winnow::kernels {
namespace {

// The largest power of two up to 256 that divides all the addresses.
uint32_t CommonAlignment(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 256;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  return static_cast<uint32_t>(bits & (~bits + 1));
}

bool Aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

absl::Status CublasStatus(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  return absl::InternalError(
      absl::StrCat("cublaslt: ", what, ": ", cublasLtGetStatusString(status)));
}

// Frees a cuBLASLt object; what that returns cannot be acted upon.
struct Destroy {
  void operator()(cublasLtMatmulDesc_t p) const { cublasLtMatmulDescDestroy(p); }
  void operator()(cublasLtMatrixLayout_t p) const { cublasLtMatrixLayoutDestroy(p); }
  void operator()(cublasLtMatmulPreference_t p) const { cublasLtMatmulPreferenceDestroy(p); }
};
template <typename T>
using Owned = std::unique_ptr<std::remove_pointer_t<T>, Destroy>;

absl::StatusOr<Owned<cublasLtMatrixLayout_t>> MakeLayout(cudaDataType_t type, int rows, int columns,
                                                         int64_t stride) {
  cublasLtMatrixLayout_t layout = nullptr;
  WINNOW_RETURN_IF_ERROR(
      CublasStatus(cublasLtMatrixLayoutCreate(&layout, type, static_cast<uint64_t>(rows),
                                              static_cast<uint64_t>(columns), stride),
                   "layout"));
  return Owned<cublasLtMatrixLayout_t>(layout);
}

template <typename T>
absl::Status SetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t name,
                          const T& value) {
  return CublasStatus(cublasLtMatmulDescSetAttribute(desc, name, &value, sizeof(value)),
                      "attribute");
}

absl::Status Invalid(const char* field, int64_t value) {
  return absl::InvalidArgumentError(absl::StrCat("matmul: ", field, "=", value));
}

}  // namespace

// cuBLASLt's matrices are column-major: w is its transposed A, x its B, out its D.
struct CublasLt::Plan {
  Owned<cublasLtMatmulDesc_t> desc;
  Owned<cublasLtMatrixLayout_t> w, x, out;
  cublasLtMatmulAlgo_t algorithm;
};

absl::Status ValidateMatmul(const MatmulParams& p) {
  if (p.type > MatmulType::kE4m3) return Invalid("type", static_cast<int>(p.type));
  if (p.scales > MatmulScales::kPerRow) return Invalid("scales", static_cast<int>(p.scales));
  const bool e4m3 = p.type == MatmulType::kE4m3;
  if (p.m < 0) return Invalid("m", p.m);
  if (p.n < 1 || (e4m3 && p.n % 16 != 0)) return Invalid("n", p.n);
  if (p.k < 1 || p.k % (e4m3 ? 16 : 8) != 0) return Invalid("k", p.k);
  if (p.ldx < p.k || p.ldx % (e4m3 ? 16 : 8) != 0) return Invalid("ldx", p.ldx);
  if ((p.out_f32 == nullptr) == (p.out_bf16 == nullptr)) {
    return absl::InvalidArgumentError("matmul: one of out_f32 and out_bf16 must be set");
  }
  if (p.accumulate && p.out_f32 == nullptr) {
    return absl::InvalidArgumentError("matmul: accumulate adds to out_f32");
  }
  if (p.ldo < p.n || p.ldo % (p.out_f32 != nullptr ? 4 : 8) != 0) return Invalid("ldo", p.ldo);
  if (p.x == nullptr || p.w == nullptr || !Aligned(p.x, 16) || !Aligned(p.w, 16) ||
      !Aligned(p.out_f32, 16) || !Aligned(p.out_bf16, 16)) {
    return absl::InvalidArgumentError("matmul: x, w or out is null or not aligned to 16 bytes");
  }
  if ((p.x_scale != nullptr) != e4m3 || (p.w_scale != nullptr) != e4m3) {
    return absl::InvalidArgumentError(
        "matmul: x_scale and w_scale belong to e4m3, and to it alone");
  }
  if ((p.workspace == nullptr && p.workspace_bytes > 0) || !Aligned(p.workspace, 256)) {
    return absl::InvalidArgumentError("matmul: workspace is null or not aligned to 256 bytes");
  }
  return absl::OkStatus();
}

CublasLt::CublasLt(cublasLtContext* handle) : handle_(handle) {}

CublasLt::~CublasLt() {
  plans_.clear();
  cublasLtDestroy(handle_);
}

absl::StatusOr<std::unique_ptr<CublasLt>> CublasLt::Create() {
  cublasLtHandle_t handle = nullptr;
  WINNOW_RETURN_IF_ERROR(CublasStatus(cublasLtCreate(&handle), "create"));
  return std::unique_ptr<CublasLt>(new CublasLt(handle));
}

absl::StatusOr<std::unique_ptr<CublasLt::Plan>> CublasLt::MakePlan(const Key& key) const {
  const bool e4m3 = key.type == MatmulType::kE4m3;
  const cudaDataType_t type = e4m3 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
  auto plan = std::make_unique<Plan>();
  cublasLtMatmulDesc_t desc = nullptr;
  WINNOW_RETURN_IF_ERROR(
      CublasStatus(cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "descriptor"));
  plan->desc.reset(desc);
  WINNOW_RETURN_IF_ERROR(SetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T));
  if (e4m3 && key.scales == MatmulScales::kPerRow) {
    const int32_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    WINNOW_RETURN_IF_ERROR(SetAttribute(desc, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode));
    WINNOW_RETURN_IF_ERROR(SetAttribute(desc, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode));
  }
  if (e4m3) {
    // The heuristics want to know that there are scales; a product sets its own.
    const void* some = reinterpret_cast<const void*>(uintptr_t{256});
    WINNOW_RETURN_IF_ERROR(SetAttribute(desc, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, some));
    WINNOW_RETURN_IF_ERROR(SetAttribute(desc, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, some));
  }
  WINNOW_ASSIGN_OR_RETURN(plan->w, MakeLayout(type, key.k, key.n, key.k));
  WINNOW_ASSIGN_OR_RETURN(plan->x, MakeLayout(type, key.k, key.m, key.ldx));
  WINNOW_ASSIGN_OR_RETURN(
      plan->out, MakeLayout(key.bf16_out ? CUDA_R_16BF : CUDA_R_32F, key.n, key.m, key.ldo));
  cublasLtMatmulPreference_t preference = nullptr;
  WINNOW_RETURN_IF_ERROR(CublasStatus(cublasLtMatmulPreferenceCreate(&preference), "preference"));
  const Owned<cublasLtMatmulPreference_t> owned(preference);
  WINNOW_RETURN_IF_ERROR(CublasStatus(
      cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                           &key.workspace_bytes, sizeof(key.workspace_bytes)),
      "preference"));
  for (const auto field :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    WINNOW_RETURN_IF_ERROR(
        CublasStatus(cublasLtMatmulPreferenceSetAttribute(preference, field, &key.alignment,
                                                          sizeof(key.alignment)),
                     "preference"));
  }
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(handle_, desc, plan->w.get(), plan->x.get(), plan->out.get(),
                                     plan->out.get(), preference, 1, &result, &found);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || (status == CUBLAS_STATUS_SUCCESS && found == 0)) {
    return absl::UnimplementedError(absl::StrCat(
        "matmul: cuBLASLt has no kernel for m=", key.m, " n=", key.n, " k=", key.k,
        " ldx=", key.ldx, " ldo=", key.ldo, " type=", static_cast<int>(key.type),
        " scales=", static_cast<int>(key.scales), " workspace_bytes=", key.workspace_bytes));
  }
  WINNOW_RETURN_IF_ERROR(CublasStatus(status, "heuristics"));
  plan->algorithm = result.algo;
  return plan;
}

absl::Status CublasLt::Launch(const MatmulParams& p, StreamHandle stream) {
  WINNOW_RETURN_IF_ERROR(ValidateMatmul(p));
  if (p.m == 0) return absl::OkStatus();
  const Key key{.m = p.m,
                .n = p.n,
                .k = p.k,
                .ldx = p.ldx,
                .ldo = p.ldo,
                .workspace_bytes = p.workspace_bytes,
                .type = p.type,
                .scales = p.scales,
                .bf16_out = p.out_bf16 != nullptr,
                .accumulate = p.accumulate,
                .alignment = CommonAlignment({p.x, p.w, p.out_f32, p.out_bf16})};
  auto at = plans_.find(key);
  if (at == plans_.end()) {
    WINNOW_ASSIGN_OR_RETURN(std::unique_ptr<Plan> plan, MakePlan(key));
    if (plans_.size() >= kMaxPlans) {
      plans_.erase(std::min_element(plans_.begin(), plans_.end(), [](const auto& a, const auto& b) {
        return a.second.last_use < b.second.last_use;
      }));
    }
    at = plans_.emplace(key, Entry{.plan = std::move(plan), .last_use = 0}).first;
  }
  at->second.last_use = ++num_uses_;
  const Plan& plan = *at->second.plan;
  if (p.type == MatmulType::kE4m3) {
    WINNOW_RETURN_IF_ERROR(
        SetAttribute(plan.desc.get(), CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, p.w_scale));
    WINNOW_RETURN_IF_ERROR(
        SetAttribute(plan.desc.get(), CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, p.x_scale));
  }
  const float alpha = 1.0f, beta = p.accumulate ? 1.0f : 0.0f;
  void* out = p.out_f32 != nullptr ? static_cast<void*>(p.out_f32) : p.out_bf16;
  return CublasStatus(cublasLtMatmul(handle_, plan.desc.get(), &alpha, p.w, plan.w.get(), p.x,
                                     plan.x.get(), &beta, out, plan.out.get(), out, plan.out.get(),
                                     &plan.algorithm, p.workspace, p.workspace_bytes, stream),
                      "matmul");
}

}  // namespace winnow::kernels
