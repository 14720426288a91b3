#include "kernels/prefill_primitives.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/base/status_macros.h"

namespace winnow::kernels {
namespace {

absl::Status CheckShape(const char* op, bool pointers, std::initializer_list<int> dims,
                        size_t row_bytes) {
  if (!pointers) return absl::InvalidArgumentError(absl::StrCat(op, ": a pointer is null"));
  constexpr int kMost = 1 << 30;  // kernels step through dimensions in 32 bits
  for (const int dim : dims) {
    if (dim < 0 || dim > kMost) {
      return absl::InvalidArgumentError(absl::StrCat(op, ": dimension ", dim));
    }
  }
  if (row_bytes == 0) return absl::InvalidArgumentError(absl::StrCat(op, ": row_bytes=0"));
  return absl::OkStatus();
}

absl::Status CheckRange(const char* what, int64_t at, int value, int max) {
  if (value >= 0 && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, "[", at, "]=", value, " is outside [0, ", max, "]"));
}

uint8_t* Bytes(void* p) { return static_cast<uint8_t*>(p); }
const uint8_t* Bytes(const void* p) { return static_cast<const uint8_t*>(p); }

}  // namespace

absl::Status ValidateLeftPad2d(const LeftPad2dParams& p) {
  return CheckShape("left_pad_2d", p.in != nullptr && p.lens != nullptr && p.out != nullptr,
                    {p.num_rows, p.seq}, p.row_bytes);
}

absl::Status LeftPad2dCpu(const LeftPad2dParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateLeftPad2d(p));
  for (int n = 0; n < p.num_rows; ++n) {
    WINNOW_RETURN_IF_ERROR(CheckRange("left_pad_2d: lens", n, p.lens[n], p.seq));
  }
  const size_t plane = static_cast<size_t>(p.seq) * p.row_bytes;
  for (int n = 0; n < p.num_rows; ++n) {
    const size_t kept = static_cast<size_t>(p.lens[n]) * p.row_bytes;
    uint8_t* out = Bytes(p.out) + static_cast<size_t>(n) * plane;
    std::memset(out, 0, plane - kept);
    std::memcpy(out + (plane - kept), Bytes(p.in) + static_cast<size_t>(n) * plane, kept);
  }
  return absl::OkStatus();
}

#if !defined(WINNOW_HAVE_CUDA)
absl::Status LaunchLeftPad2d(const LeftPad2dParams&, StreamHandle) {
  return absl::UnimplementedError("left_pad_2d: built without CUDA");
}
absl::Status LaunchScatterByIndex(const ScatterByIndexParams&, StreamHandle) {
  return absl::UnimplementedError("scatter_by_index: built without CUDA");
}
absl::Status LaunchBoolGatherLeftPad(const BoolGatherLeftPadParams&, StreamHandle) {
  return absl::UnimplementedError("bool_gather_left_pad: built without CUDA");
}
absl::Status LaunchCompactByBool(const CompactByBoolParams&, StreamHandle) {
  return absl::UnimplementedError("compact_by_bool: built without CUDA");
}
#endif

absl::Status ValidateScatterByIndex(const ScatterByIndexParams& p) {
  return CheckShape("scatter_by_index",
                    p.in != nullptr && p.idx != nullptr && p.lens != nullptr && p.out != nullptr,
                    {p.batch, p.in_seq, p.out_seq, p.max_len}, p.row_bytes);
}

absl::Status ScatterByIndexCpu(const ScatterByIndexParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateScatterByIndex(p));
  for (int b = 0; b < p.batch; ++b) {
    WINNOW_RETURN_IF_ERROR(
        CheckRange("scatter_by_index: lens", b, p.lens[b], std::min(p.max_len, p.in_seq)));
    for (int j = 0; j < p.lens[b]; ++j) {
      const int64_t at = static_cast<int64_t>(b) * p.max_len + j;
      WINNOW_RETURN_IF_ERROR(CheckRange("scatter_by_index: idx", at, p.idx[at], p.out_seq - 1));
    }
  }
  std::memset(p.out, 0,
              static_cast<size_t>(p.batch) * static_cast<size_t>(p.out_seq) * p.row_bytes);
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int j = 0; j < p.lens[b]; ++j) {
      const int64_t from = b * p.in_seq + (p.in_seq - p.lens[b] + j);
      const int64_t to = b * p.out_seq + p.idx[b * p.max_len + j];
      std::memcpy(Bytes(p.out) + static_cast<size_t>(to) * p.row_bytes,
                  Bytes(p.in) + static_cast<size_t>(from) * p.row_bytes, p.row_bytes);
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateBoolGatherLeftPad(const BoolGatherLeftPadParams& p) {
  return CheckShape("bool_gather_left_pad",
                    p.in != nullptr && p.mask != nullptr && p.out != nullptr && p.idx != nullptr &&
                        p.counts != nullptr,
                    {p.batch, p.num_heads, p.seq}, p.row_bytes);
}

absl::Status BoolGatherLeftPadCpu(const BoolGatherLeftPadParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateBoolGatherLeftPad(p));
  for (int64_t b = 0; b < p.batch; ++b) {
    int32_t* idx = p.idx + b * p.seq;
    int count = 0;
    for (int s = 0; s < p.seq; ++s) {
      if (p.mask[b * p.seq + s] != 0) idx[count++] = s;
    }
    std::fill(idx + count, idx + p.seq, -1);
    p.counts[b] = count;
    for (int64_t h = 0; h < p.num_heads; ++h) {
      const size_t plane = static_cast<size_t>((b * p.num_heads + h) * p.seq) * p.row_bytes;
      const size_t pad = static_cast<size_t>(p.seq - count) * p.row_bytes;
      uint8_t* out = Bytes(p.out) + plane;
      std::memset(out, 0, pad);
      for (int j = 0; j < count; ++j) {
        std::memcpy(out + pad + static_cast<size_t>(j) * p.row_bytes,
                    Bytes(p.in) + plane + static_cast<size_t>(idx[j]) * p.row_bytes, p.row_bytes);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status ValidateCompactByBool(const CompactByBoolParams& p) {
  return CheckShape("compact_by_bool",
                    p.in != nullptr && p.mask != nullptr && p.out != nullptr && p.counts != nullptr,
                    {p.num_rows, p.seq}, p.row_bytes);
}

absl::Status CompactByBoolCpu(const CompactByBoolParams& p) {
  WINNOW_RETURN_IF_ERROR(ValidateCompactByBool(p));
  const size_t plane = static_cast<size_t>(p.seq) * p.row_bytes;
  for (int64_t n = 0; n < p.num_rows; ++n) {
    const uint8_t* in = Bytes(p.in) + static_cast<size_t>(n) * plane;
    uint8_t* out = Bytes(p.out) + static_cast<size_t>(n) * plane;
    std::memcpy(out, in, plane);
    int count = 0;
    for (int s = 0; s < p.seq; ++s) {
      if (p.mask[n * p.seq + s] == 0) continue;
      std::memcpy(out + static_cast<size_t>(count++) * p.row_bytes,
                  in + static_cast<size_t>(s) * p.row_bytes, p.row_bytes);
    }
    p.counts[n] = count;
  }
  return absl::OkStatus();
}

absl::Status KeyStateCpu(const KeyStateParams& p) {
  WINNOW_RETURN_IF_ERROR(
      CheckShape("key_state",
                 p.new_decisions != nullptr && p.new_lens != nullptr && p.state != nullptr &&
                     (p.old_seq == 0 || (p.old_evicted != nullptr && p.old_lens != nullptr)),
                 {p.num_rows, p.old_seq, p.new_seq}, 1));
  for (int64_t n = 0; n < p.num_rows; ++n) {
    const int old_len = p.old_seq == 0 ? 0 : p.old_lens[n];
    WINNOW_RETURN_IF_ERROR(CheckRange("key_state: old_lens", n, old_len, p.old_seq));
    WINNOW_RETURN_IF_ERROR(CheckRange("key_state: new_lens", n, p.new_lens[n], p.new_seq));
    const int pad = p.new_seq - p.new_lens[n];
    // Of the first new token, which stands after the padding.
    const bool carry = p.new_lens[n] > 0 && p.new_decisions[n * p.new_seq + pad] != 0;
    KeyState* state = p.state + n * (int64_t{p.old_seq} + p.new_seq);
    for (int i = 0; i < p.old_seq; ++i) {
      const bool evict = p.old_evicted[n * p.old_seq + i] != 0 || (i == p.old_seq - 1 && carry);
      state[i] = i < p.old_seq - old_len ? KeyState::kPadding
                 : evict                 ? KeyState::kEvict
                                         : KeyState::kKeep;
    }
    for (int i = 0; i < p.new_seq; ++i) {
      const bool evict = i + 1 < p.new_seq && p.new_decisions[n * p.new_seq + i + 1] != 0;
      state[p.old_seq + i] = i < pad ? KeyState::kPadding
                             : evict ? KeyState::kEvict
                                     : KeyState::kKeep;
    }
  }
  return absl::OkStatus();
}

absl::Status DmsFusedPrefillCpu(const DmsFusedPrefillParams& p) {
  WINNOW_RETURN_IF_ERROR(CheckShape(
      "dms_fused_prefill",
      p.q != nullptr && p.k != nullptr && p.v != nullptr && p.state != nullptr && p.out != nullptr,
      {p.batch, p.old_seq, p.new_seq, p.window}, 1));
  if (p.head_dim < 1 || p.num_kv_heads < 1 || p.num_heads % p.num_kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat("dms_fused_prefill: head_dim=", p.head_dim,
                                                   " num_heads=", p.num_heads,
                                                   " num_kv_heads=", p.num_kv_heads));
  }
  const int64_t group = p.num_heads / p.num_kv_heads;
  const int64_t keys = int64_t{p.old_seq} + p.new_seq;
  std::vector<float> weights(static_cast<size_t>(keys));
  for (int64_t bg = 0; bg < int64_t{p.batch} * p.num_kv_heads; ++bg) {
    const KeyState* state = p.state + bg * keys;
    const float* k = p.k + bg * keys * p.head_dim;
    const float* v = p.v + bg * keys * p.head_dim;
    for (int64_t m = 0; m < p.new_seq; ++m) {
      const int64_t pos = p.old_seq + m;
      const auto visible = [&](int64_t n) {
        return state[n] != KeyState::kPadding &&
               (pos - n <= p.window || state[n] == KeyState::kKeep);
      };
      for (int64_t h = 0; h < group; ++h) {
        // Query head bg * group + h is [batch, num_heads] in the same order.
        const float* q = p.q + ((bg * group + h) * p.new_seq + m) * p.head_dim;
        float* out = p.out + ((bg * p.new_seq + m) * group + h) * p.head_dim;
        std::fill(out, out + p.head_dim, 0.0f);
        float max = -std::numeric_limits<float>::infinity();
        for (int64_t n = 0; n <= pos; ++n) {
          if (!visible(n)) continue;
          float dot = 0.0f;
          for (int d = 0; d < p.head_dim; ++d) dot += q[d] * k[n * p.head_dim + d];
          weights[static_cast<size_t>(n)] = dot * p.scale;
          max = std::max(max, dot * p.scale);
        }
        float sum = 0.0f;
        for (int64_t n = 0; n <= pos; ++n) {
          if (!visible(n)) continue;
          const float w = std::exp(weights[static_cast<size_t>(n)] - max);
          sum += w;
          for (int d = 0; d < p.head_dim; ++d) out[d] += w * v[n * p.head_dim + d];
        }
        if (sum == 0.0f) continue;
        for (int d = 0; d < p.head_dim; ++d) out[d] /= sum;
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace winnow::kernels
