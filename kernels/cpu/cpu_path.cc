#include "kernels/cpu/cpu_path.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/base/log.h"
#include "hwy/highway.h"

namespace winnow::kernels {
namespace {

constexpr CpuPath kAllPaths[] = {CpuPath::kScalar, CpuPath::kAvx2, CpuPath::kAvx512,
                                 CpuPath::kAvx512Bf16};
constexpr int64_t kAvx512Targets = HWY_AVX3 | HWY_AVX3_DL;
constexpr int64_t kNarrowTargets = HWY_SSSE3 | HWY_SSE4;

// What the host offers, asked while Highway is not yet capped.
CpuPath WidestPath() {
#if HWY_ARCH_X86_64
  const int64_t targets = hwy::SupportedTargets();
  if ((targets & HWY_AVX3) != 0) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") ? CpuPath::kAvx512Bf16 : CpuPath::kAvx512;
  }
  if ((targets & HWY_AVX2) != 0) return CpuPath::kAvx2;
#endif
  return CpuPath::kScalar;
}

void CapHighway(CpuPath path) {
  int64_t disabled = 0;
  if (path < CpuPath::kAvx512) disabled |= kAvx512Targets;
  if (path < CpuPath::kAvx2) disabled |= HWY_AVX2 | kNarrowTargets;
  hwy::DisableTargets(disabled);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

struct State {
  const CpuPath widest = WidestPath();
  std::atomic<CpuPath> active{widest};

  State() {
    const char* cap = std::getenv("WINNOW_CPU_PATH");
    if (cap == nullptr || *cap == '\0') return;
    for (const CpuPath path : kAllPaths) {
      if (std::strcmp(cap, CpuPathName(path)) != 0) continue;
      if (path < widest) {
        active.store(path, std::memory_order_relaxed);
        CapHighway(path);
      }
      return;
    }
    LogLine(
        LogLevel::kWarning, "cpu_path_ignored",
        LogField("WINNOW_CPU_PATH", cap) + LogField("allowed", "scalar, avx2, avx512, avx512bf16"));
  }
};

State& GetState() {
  static State state;
  return state;
}

}  // namespace

CpuPath ActiveCpuPath() { return GetState().active.load(std::memory_order_relaxed); }

const char* CpuPathName(CpuPath path) {
  switch (path) {
    case CpuPath::kScalar:
      return "scalar";
    case CpuPath::kAvx2:
      return "avx2";
    case CpuPath::kAvx512:
      return "avx512";
    case CpuPath::kAvx512Bf16:
      return "avx512bf16";
  }
  return "scalar";
}

bool SetCpuPathForTest(CpuPath path) {
  State& state = GetState();
  if (path > state.widest) return false;
  state.active.store(path, std::memory_order_relaxed);
  CapHighway(path);
  return true;
}

}  // namespace winnow::kernels
