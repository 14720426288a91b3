"""Causal attention in which keys behind the window carry a bias: log of the probability that they were kept.

One contract, two implementations. For query i and key j <= i of a KV head:
    score(i, j) = q_i . k_j / sqrt(d) + (far_bias_j if i - j > window else 0)
`masked` materialises the T x T scores: any device, any dtype, the reference. `compact` is for training on a GPU: a
sliding-window part and a far part that visits only the keys whose bias is not negligible, joined by their log-sum-exps.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

BLOCK = 128
NEGLIGIBLE = -18.0  # exp(-18): below what a BF16 softmax resolves, and below any useful gradient.


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
  """Dense causal attention. q [B,H,T,d], k and v [B,G,T,d]; returns [B,H,T,d]."""
  if q.dtype == torch.float32 and q.is_cuda:    # The float32 kernel knows no groups; the fallback keeps all scores.
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
  return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, far_bias: torch.Tensor, window: int) -> torch.Tensor:
  """Reference. far_bias [B,G,T] (float32; -inf hides a key); returns [B,H,T,d]."""
  length, group = q.shape[2], q.shape[1] // k.shape[1]
  position = torch.arange(length, device=q.device)
  distance = position[:, None] - position[None, :]
  bias = torch.where(distance > window, far_bias[:, :, None, :], 0.0)
  bias = bias.masked_fill(distance < 0, float("-inf")).to(q.dtype)
  return F.scaled_dot_product_attention(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1),
                                        attn_mask=bias.repeat_interleave(group, 1))


def window_mask(length: int, window: int, device: torch.device) -> BlockMask:
  """Block mask of the sliding window: 0 <= i - j <= window."""
  inside = lambda b, h, i, j: (i >= j) & (i - j <= window)
  return create_block_mask(inside, None, None, length, length, device=device, BLOCK_SIZE=BLOCK)


def _survivors(far_bias: torch.Tensor) -> torch.Tensor:
  """Positions [B,G,T] of the keys that matter, ascending, then 2T (never visible)."""
  length = far_bias.shape[-1]
  position = torch.arange(length, device=far_bias.device)
  alive = far_bias.detach() > NEGLIGIBLE
  return torch.where(alive, position, 2 * length).sort(dim=-1).values


def _far_mask(order: torch.Tensor, window: int, group: int) -> BlockMask:
  """Block mask of the far part over keys sorted by position: key slot s is visible to i iff i - order[s] > window.

  Positions ascend, so a query block needs a prefix of the key blocks, and a key block a suffix of the query blocks.
  """
  length = order.shape[-1]
  blocks = length // BLOCK
  number = torch.arange(blocks, device=order.device, dtype=torch.int32)
  first = order[..., ::BLOCK]                                      # [B,G,blocks]; 2T for a block without keys.
  last_query = number * BLOCK + BLOCK - 1
  needed = first[:, :, None, :] + window < last_query[:, None]     # [B,G,query block,key block]
  needed = needed.repeat_interleave(group, 1)
  keys = needed.sum(-1, dtype=torch.int32)
  queries = needed.sum(-2, dtype=torch.int32)
  key_index = number.expand(needed.shape).contiguous()
  query_index = (blocks - queries)[..., None] + number
  query_index = query_index.clamp(max=blocks - 1).to(torch.int32).contiguous()
  slots = order.repeat_interleave(group, 1)

  def visible(b, h, i, s):
    return i - slots[b, h, s] > window

  return BlockMask(seq_lengths=(length, length), kv_num_blocks=keys, kv_indices=key_index, full_kv_num_blocks=None,
                   full_kv_indices=None, q_num_blocks=queries, q_indices=query_index, full_q_num_blocks=None,
                   full_q_indices=None, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)


def compact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, far_bias: torch.Tensor, window: int,
            near_mask: BlockMask) -> torch.Tensor:
  """Same result as `masked` up to rounding and exp(NEGLIGIBLE); T must be a multiple of BLOCK.

  The bias travels as two extra channels of the far keys (a high and a low part), so its gradient comes out of the
  ordinary key gradient instead of scattered atomic additions. Far keys are repeated for each query head: the backward
  pass walks all queries of a key block in one program, and few key blocks are left.
  """
  _, heads, length, dim = q.shape
  group, scale = heads // k.shape[1], dim ** -0.5
  lse = AuxRequest(lse=True)
  near, near_aux = flex_attention(q, k, v, block_mask=near_mask, scale=scale, enable_gqa=True, return_aux=lse)

  order = _survivors(far_bias)
  bias = far_bias.clamp(min=NEGLIGIBLE)
  high = bias.to(k.dtype)
  low = (bias - high.float()).detach().to(k.dtype)
  width = 1 << (dim + 1).bit_length()
  far_k = F.pad(torch.cat([k, high[..., None], low[..., None]], -1), (0, width - dim - 2))
  far_v = F.pad(v, (0, width - dim))
  index = order.clamp(max=length - 1)[..., None].expand(-1, -1, -1, width)
  far_k = far_k.gather(2, index).repeat_interleave(group, 1)
  far_v = far_v.gather(2, index).repeat_interleave(group, 1)
  ones = torch.full_like(q[..., :2], 1.0 / scale)
  far_q = F.pad(torch.cat([q, ones], -1), (0, width - dim - 2))
  far, far_aux = flex_attention(far_q, far_k, far_v, block_mask=_far_mask(order, window, group), scale=scale,
                                return_aux=lse)

  total = torch.logaddexp(near_aux.lse, far_aux.lse)
  near_part = (near_aux.lse - total).exp()[..., None] * near.float()
  far_part = (far_aux.lse - total).exp()[..., None] * far[..., :dim].float()
  return (near_part + far_part).to(q.dtype)


_compiled_compact = None
_window_masks: dict[tuple[int, int, torch.device], BlockMask] = {}


def compact_compiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, far_bias: torch.Tensor, window: int
                     ) -> torch.Tensor:
  """`compact` for evaluation on a GPU: one compiled kernel a length, whatever calls it."""
  global _compiled_compact
  if _compiled_compact is None:
    torch._dynamo.config.recompile_limit = 64
    _compiled_compact = torch.compile(compact, dynamic=False)
  key = (q.shape[2], window, q.device)
  if key not in _window_masks:
    _window_masks[key] = window_mask(*key)
  return _compiled_compact(q, k, v, far_bias, window, _window_masks[key])
