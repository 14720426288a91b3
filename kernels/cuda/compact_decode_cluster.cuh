#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/compact_decode_shared.cuh"

// How the blocks of a cluster merge a span that they share: each head has a block, into whose
// shared memory all of them store their pieces' results of that head.
namespace winnow::kernels::device {

// Results that a block has room for: of so many heads' pieces.
constexpr int GatherSlots(int heads, int cluster) {
  const int pieces = cluster * kMaxSharePages / kPagesPerUnit;
  return cluster < 2 ? 0
                     : (heads + cluster - 1) / cluster *
                           (pieces < kMaxSharedPieces ? pieces : kMaxSharedPieces);
}
template <int kDim>
constexpr size_t GatherBytes(int slots) {
  return static_cast<size_t>(slots) * (kDim * sizeof(float) + sizeof(float2));
}

#if WINNOW_SM90A

// Of all threads of the cluster, once: the barriers that they initialized before, and fenced, are
// there after the wait.
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWaitAll() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// The merging warps' view of a span that its cluster shares. Of the `num_active` blocks that have
// pieces, block r merges heads r, r + num_active, ...
template <int kDim, int kHeads>
class SpanGather {
 public:
  // `memory` is where GatherBytes() lie in every block, `full` a barrier of one arrival.
  __device__ __forceinline__ SpanGather(uint8_t* memory, int slots, uint64_t* full, int group,
                                        int num_pieces)
      : out_(reinterpret_cast<float*>(memory)),
        norm_(reinterpret_cast<float2*>(out_ + slots * kDim)),
        full_(full),
        num_pieces_(num_pieces) {
    uint32_t rank, size;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    rank_ = static_cast<int>(rank);
    num_active_ = min(static_cast<int>(size), num_pieces);
    num_own_ = rank_ < group ? (group - rank_ + num_active_ - 1) / num_active_ : 0;
  }

  // Says how much will come here. One thread.
  __device__ __forceinline__ void Expect() const {
    if (num_own_ == 0) return;
    ptx::BarrierArriveExpect(full_, static_cast<uint32_t>(num_own_ * num_pieces_ *
                                                          (kDim * sizeof(float) + sizeof(float2))));
  }

  // Where a lane's four channels of a head go, those of the first piece.
  struct Target {
    uint32_t out = 0, norm = 0, full = 0;
  };
  __device__ __forceinline__ Target Aim(int head, int channel) const {
    const int slot = head / num_active_ * num_pieces_, block = head % num_active_;
    return {AddressIn(out_ + slot * kDim + channel, block), AddressIn(norm_ + slot, block),
            AddressIn(full_, block)};
  }

  // Stores them of a piece and, with the head's first ones, the rest.
  static __device__ __forceinline__ void Put(const Target& to, int piece, bool is_first,
                                             const float4& x, float max, float sum) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4},"
        " [%5];" ::"r"(to.out + piece * kDim * static_cast<int>(sizeof(float))),
        "r"(__float_as_uint(x.x)), "r"(__float_as_uint(x.y)), "r"(__float_as_uint(x.z)),
        "r"(__float_as_uint(x.w)), "r"(to.full)
        : "memory");
    if (is_first) {
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1,%2},"
          " [%3];" ::"r"(to.norm + piece * static_cast<int>(sizeof(float2))),
          "r"(__float_as_uint(max)), "r"(__float_as_uint(sum)), "r"(to.full)
          : "memory");
    }
  }

  // Calls store(head, channel, fold, valid) with the sum of each own head's pieces, whole warps
  // at a time. Lane `tid` of kThreads.
  template <typename Fold, int kThreads, typename Store>
  __device__ __forceinline__ void Merge(int tid, Store store) const {
    constexpr int kLanes = kDim / 4, kAtOnce = kThreads / kLanes;
    if (num_own_ == 0) return;
    const int channel = tid % kLanes * 4;
    Wait();
    for (int first = 0; first < num_own_; first += kAtOnce) {
      const int own = min(first + tid / kLanes, num_own_ - 1);
      Fold fold;
#pragma unroll 4
      for (int piece = 0; piece < num_pieces_; ++piece) {
        const int slot = own * num_pieces_ + piece;
        const float2 norm = norm_[slot];
        fold.Add(norm.x, norm.y, *reinterpret_cast<const float4*>(out_ + slot * kDim + channel));
      }
      store(rank_ + own * num_active_, channel, fold, first + tid / kLanes < num_own_);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t AddressIn(const void* p, int block) {
    uint32_t address;  // volatile: before the waits, not at its use
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(ptx::SharedAddress(p)), "r"(block));
    return address;
  }
  // For what other blocks have stored.
  __device__ __forceinline__ void Wait() const {
    asm volatile(
        "{\n.reg .pred done;\nagain:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@done bra ready;\nbra again;\nready:\n}\n" ::"r"(ptx::SharedAddress(full_))
        : "memory");
  }

  float* out_;    // [own heads, num_pieces, kDim]
  float2* norm_;  // [own heads, num_pieces]
  uint64_t* full_;
  int num_pieces_, rank_, num_active_, num_own_;
};

#endif  // WINNOW_SM90A

}  // namespace winnow::kernels::device
