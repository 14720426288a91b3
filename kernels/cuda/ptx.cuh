#pragma once

#include <cuda.h>

#include <cstdint>

// Thin wrappers of the PTX that CUDA C++ has no words for. What needs sm_90a says so
// and is an empty body in code for other targets, where nothing may call it.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WINNOW_SM90A 1
#endif

namespace winnow::kernels::ptx {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 2^x, flushing results below the normal range to zero; 2^-inf is 0.
__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within one unit in the last place or so; normal x and result.
__device__ __forceinline__ float Reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// `lo` and `hi` rounded to BF16, lo in the lower half.
__device__ __forceinline__ uint32_t PackBf16(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}

// Four values rounded to e4m3, saturating, `a` in the lowest byte; a NaN stays one.
__device__ __forceinline__ uint32_t PackE4m3(float a, float b, float c, float d) {
  uint32_t packed;
#if __CUDA_ARCH__ >= 890
  asm("{\n.reg .b16 lo, hi;\n"
      "cvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
      "mov.b32 %0, {lo, hi};\n}\n"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
#else
  packed = 0x7f7f7f7fu;
#endif
  return packed;
}

// Two float16 in a word. A NaN loses against any number in Max2(), and FmaSaturated2(), which
// cuts to [0, 1], makes it 0.
__device__ __forceinline__ uint32_t PackF16(float lo, float hi) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(hi), "f"(lo));
  return packed;
}
__device__ __forceinline__ float2 UnpackF16(uint32_t packed) {
  float2 x;
  asm("{\n.reg .b16 lo, hi;\nmov.b32 {lo, hi}, %2;\ncvt.f32.f16 %0, lo;\ncvt.f32.f16 %1, hi;\n}\n"
      : "=f"(x.x), "=f"(x.y)
      : "r"(packed));
  return x;
}
__device__ __forceinline__ uint32_t Mul2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ uint32_t Fma2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t FmaSaturated2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.sat.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t Max2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// A place in a ring of barriers, and the parity of its round.
struct RingPlace {
  int at = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Next(int size) {
    if (++at == size) {
      at = 0;
      parity ^= 1;
    }
  }
};

// Waits for the kernels before this one in the stream, where LaunchEarly() started it.
__device__ __forceinline__ void WaitForPredecessors() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks be placed once every block of this one has come here or
// ended, where LaunchEarly() enqueued it. They still wait for this one's results.
__device__ __forceinline__ void LetDependentsStart() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// At an mbarrier one lane arrives for its warp after __syncwarp(). compute-sanitizer's racecheck,
// which follows lanes one by one, takes that for the lane's own accesses alone: with
// WINNOW_RACECHECK all lanes do.
#ifdef WINNOW_RACECHECK
inline constexpr uint32_t kWarpArrivals = 32;
#else
inline constexpr uint32_t kWarpArrivals = 1;
#endif
__device__ __forceinline__ bool ArrivesForWarp(int lane) { return kWarpArrivals > 1 || lane == 0; }

#if WINNOW_SM90A

// --- mbarrier (shared memory, 8 bytes) ---

__device__ __forceinline__ void BarrierInit(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes initialized barriers visible to the copy engine; before the block's first barrier.
__device__ __forceinline__ void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void BarrierArrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}

// One arrival, and `bytes` that copies will complete.
__device__ __forceinline__ void BarrierArriveExpect(uint64_t* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits until the phase of parity `parity` has completed.
__device__ __forceinline__ void BarrierWait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(parity)
      : "memory");
}

// --- named barriers ---

__device__ __forceinline__ void NamedSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void NamedArrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// --- the copy engine ---

// Brings a map near, before its first use.
__device__ __forceinline__ void PrefetchMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the map's box at the coordinates (fastest first) into shared memory;
// the bytes complete on `barrier`. Coordinates outside the tensor give zeros.
__device__ __forceinline__ void LoadBox3(void* to, const CUtensorMap* map, uint64_t* barrier,
                                         int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(SharedAddress(to)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
__device__ __forceinline__ void LoadBox2(void* to, const CUtensorMap* map, uint64_t* barrier,
                                         int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(SharedAddress(to)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1)
      : "memory");
}
// `bytes` contiguous ones, a multiple of 16; both addresses too.
__device__ __forceinline__ void LoadBulk(void* to, const void* from, uint32_t bytes,
                                         uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}
__device__ __forceinline__ void LoadBox4(void* to, const CUtensorMap* map, uint64_t* barrier,
                                         int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(SharedAddress(to)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// LoadBox2() and LoadBox4() of what is read once: `policy` is the L2 cache's, createpolicy's.
__device__ __forceinline__ void LoadBox2Once(void* to, const CUtensorMap* map, uint64_t* barrier,
                                             int c0, int c1, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(SharedAddress(to)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void LoadBox4Once(void* to, const CUtensorMap* map, uint64_t* barrier,
                                             int c0, int c1, int c2, int c3, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(SharedAddress(to)),
      "l"(map), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "l"(policy)
      : "memory");
}

// Makes this thread's writes to shared memory visible to wgmma, after a barrier.
__device__ __forceinline__ void FenceForWgmma() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- warpgroups ---

template <int kRegisters>
__device__ __forceinline__ void RegistersUp() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void RegistersDown() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first wgmma and after any other access to its registers.
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `kPending` committed groups are under way.
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving accesses of `x` across this point.
template <int kN>
__device__ __forceinline__ void Pin(float (&x)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int kN>
__device__ __forceinline__ void Pin(uint32_t (&x)[kN]) {
#pragma unroll
  for (int i = 0; i < kN; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// Descriptor of a matrix in shared memory in 128-byte swizzled rows of 64 BF16, as
// boxes 64 wide are copied. The start must lie in a 1024-byte pattern's first row.
// K-major operands (rows are M or N): `leading_bytes` is unused, 8 rows are 1024 bytes.
// N-major ones (rows are K): `leading_bytes` from one 64 columns to the next.
// Starts further on by a multiple of 16 bytes are that sixteenth more. The high word is
// the same for all.
inline constexpr uint32_t kSwizzledMatrixHigh = 1024 >> 4 | 1 << 30;
__device__ __forceinline__ uint64_t SwizzledMatrix(const void* start, uint32_t leading_bytes) {
  const uint32_t address = (SharedAddress(start) & 0x3ffff) >> 4;
  return uint64_t{kSwizzledMatrixHigh} << 32 | leading_bytes >> 4 << 16 | address;
}

// Descriptor of a K-major matrix in shared memory in blocks of 8 rows of 16 bytes, 128
// bytes a block: `column_bytes` from one 16 bytes of a row to the next, `row_bytes` from
// one 8 rows to the next.
__device__ __forceinline__ uint64_t BlockedMatrix(const void* start, uint32_t column_bytes,
                                                  uint32_t row_bytes) {
  const uint64_t address = (SharedAddress(start) & 0x3ffff) >> 4;
  return address | static_cast<uint64_t>(column_bytes >> 4) << 16 |
         static_cast<uint64_t>(row_bytes >> 4) << 32;
}

#define WINNOW_F8(x, i)                                                                       \
  "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), \
      "+f"(x[i + 6]), "+f"(x[i + 7])
#define WINNOW_F32(x, i) \
  WINNOW_F8(x, i), WINNOW_F8(x, i + 8), WINNOW_F8(x, i + 16), WINNOW_F8(x, i + 24)
#define WINNOW_D32                                                                        \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WINNOW_D64                                                           \
  WINNOW_D32                                                                 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "   \
  "%60, %61, %62, %63"

// d[64, 128] (+)= a[64, 16] * b[128, 16]^T, all from shared memory, both K-major.
__device__ __forceinline__ void WgmmaSs128(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WINNOW_D64
      "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
      : WINNOW_F32(d, 0), WINNOW_F32(d, 32)
      : "l"(a), "l"(b), "r"(accumulate));
}

// d[64, N] (+)= a[64, 16] (registers) * b[16, N], b N-major.
__device__ __forceinline__ void WgmmaRs(float (&d)[64], const uint32_t* a, uint64_t b,
                                        int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WINNOW_D64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}\n"
      : WINNOW_F32(d, 0), WINNOW_F32(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
__device__ __forceinline__ void WgmmaRs(float (&d)[32], const uint32_t* a, uint64_t b,
                                        int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WINNOW_D32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}\n"
      : WINNOW_F32(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#define WINNOW_R8(x, i)                                                                       \
  "+r"(x[i]), "+r"(x[i + 1]), "+r"(x[i + 2]), "+r"(x[i + 3]), "+r"(x[i + 4]), "+r"(x[i + 5]), \
      "+r"(x[i + 6]), "+r"(x[i + 7])

// d[64, 128] (+)= a[64, 32] * b[128, 32]^T of e4m3, all from shared memory, both K-major; d in
// float16, two columns a word.
__device__ __forceinline__ void WgmmaE4m3Ss128(uint32_t (&d)[32], uint64_t a, uint64_t b,
                                               int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f16.e4m3.e4m3 {" WINNOW_D32
      "}, %32, %33, p, 1, 1;\n}\n"
      : WINNOW_R8(d, 0), WINNOW_R8(d, 8), WINNOW_R8(d, 16), WINNOW_R8(d, 24)
      : "l"(a), "l"(b), "r"(accumulate));
}

// d[64, 136] (+)= a[64, 32] (registers) * b[136, 32]^T of e4m3, b K-major.
__device__ __forceinline__ void WgmmaE4m3Rs136(float (&d)[68], const uint32_t* a, uint64_t b,
                                               int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %73, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n136k32.f32.e4m3.e4m3 {" WINNOW_D64
      ", %64, %65, %66, %67}, {%68, %69, %70, %71}, %72, p, 1, 1;\n}\n"
      : WINNOW_F32(d, 0), WINNOW_F32(d, 32), "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

#undef WINNOW_R8
#undef WINNOW_D64
#undef WINNOW_D32
#undef WINNOW_F32
#undef WINNOW_F8

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::ptx
