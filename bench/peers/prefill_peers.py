#!/usr/bin/env python3
"""Times what the sparse prefill is measured against, on the same shapes: JSON lines.

One layer, batch 1, 32 query and 8 KV heads, BF16, random data; medians of runs that find the L2
cache flushed. Needs torch and triton. Every peer is re-expressed here from its published algorithm:

  cudnn      torch SDPA, dense causal, cuDNN forced
  proto      prefix and band in Triton, attention alone (its compaction is not timed)
  mo         NVIDIA Model-Optimizer: 4096-token chunks; flex_attention over the last window + 1
             tokens and the chunk, flash attention over the survivors, merged by log-sum-exp
  triton     one pass over all keys with the mask applied to scores, in Triton
  hub        SDPA over chunks of 512 queries with a dense mask

  bench/peers/prefill_peers.py [--peers cudnn,proto] [--lengths 8k,32k,128k] [--dims 128,64]
"""
import argparse
import json
import math
import statistics

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

QUERY_HEADS, KV_HEADS = 32, 8
GROUP = QUERY_HEADS // KV_HEADS
LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072}
FLUSH = None


def timed(work, runs):
    """Median microseconds."""
    global FLUSH
    if FLUSH is None:
        FLUSH = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for turn in range(-2, runs):
        FLUSH.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        if turn >= 0:
            times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)


def emit(case, ours, peer, us, **more):
    print(json.dumps({"case": case, "ours_case": ours, "peer": peer, "peer_us": round(us, 2),
                      **more}), flush=True)


def inputs(dim, tokens):
    make = lambda heads: torch.randn(1, heads, tokens, dim, device="cuda", dtype=torch.bfloat16)
    return make(QUERY_HEADS), make(KV_HEADS), make(KV_HEADS)


def runs_for(tokens):
    return {8192: 15, 32768: 9}.get(tokens, 3)


def measure_ceilings():
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    gemm = 2 * 8192**3 / timed(lambda: a @ b, 10) / 1e6
    x = torch.randn(1 << 28, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 4 * x.numel() / timed(lambda: y.copy_(x), 10) / 1e3
    print(json.dumps({"ceilings": {"gemm_tflops": round(gemm, 1), "copy_gbps": round(copy, 1)}}),
          flush=True)


def cudnn(dim, name, tokens):
    q, k, v = inputs(dim, tokens)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        us = timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
                   runs_for(tokens))
    tail = f"d{dim}/{name}"
    for case in ("prefill", "prefill_keep35"):
        emit(f"{case}/{tail}", f"{case}/{tail}", "cuDNN SDPA, dense causal", us)
    if dim == 128 and tokens == 32768:
        emit(f"prefill_w512/{tail}", f"prefill_w512/{tail}", "cuDNN SDPA, dense causal", us)
    if dim == 128 and tokens <= 32768:
        emit(f"prefill_dense/{tail}", f"prefill_dense/{tail}", "cuDNN SDPA, dense causal", us)


@triton.jit
def attend(q, keys, values, pos, first, last, prefix, keep, top, total, acc, scale,
           WINDOW: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Online softmax over keys [first, last); with MASK the window and keep bits decide."""
    column, dims = tl.arange(0, BLOCK), tl.arange(0, DIM)
    for start in range(first, last, BLOCK):
        j = start + column
        inside = j < last
        k = tl.load(keys + j[None, :] * DIM + dims[:, None], mask=inside[None, :], other=0.0)
        x = tl.dot(q, k) * scale
        if MASK:
            kept = tl.load(keep + j, mask=inside, other=0)
            near = pos[:, None] - j[None, :] <= WINDOW
            seen = (j[None, :] <= pos[:, None]) & (near | (kept[None, :] != 0))
            x = tl.where(seen, x, -1e30)
        else:
            x = tl.where(inside[None, :], x, -1e30)
        new_top = tl.maximum(top, tl.max(x, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(x - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(values + j[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(tl.bfloat16), v, acc * shrink[:, None])
        top = new_top
    return top, total, acc


@triton.jit
def sparse_kernel(Q, K, V, CompactK, CompactV, Keep, Counts, Out, tokens, capacity, scale,
                  WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                  DIM: tl.constexpr, GROUP_SIZE: tl.constexpr, PREFIX: tl.constexpr):
    """PREFIX: survivors from the compact tensors, then the band; else all keys, masked."""
    POSITIONS: tl.constexpr = ROWS // GROUP_SIZE
    tiles = tl.num_programs(0)
    tile, head = tiles - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    first = tile * POSITIONS
    pos = first + row // GROUP_SIZE
    at = ((head * GROUP_SIZE + row % GROUP_SIZE) * tokens + pos)[:, None] * DIM + dims[None, :]
    q = tl.load(Q + at)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    dense = 0
    if PREFIX:
        count = tl.load(Counts + head * tiles + tile)
        compact = head * capacity * DIM
        whole = count // BLOCK * BLOCK
        top, total, acc = attend(q, CompactK + compact, CompactV + compact, pos, 0, whole, 0, Keep,
                                 top, total, acc, scale, WINDOW, False, BLOCK, DIM)
        top, total, acc = attend(q, CompactK + compact, CompactV + compact, pos, whole, count, 0,
                                 Keep, top, total, acc, scale, WINDOW, False, BLOCK, DIM)
        dense = tl.maximum(0, first - WINDOW)
    top, total, acc = attend(q, K + head * tokens * DIM, V + head * tokens * DIM, pos, dense,
                             first + POSITIONS, 0, Keep + head * tokens, top, total, acc, scale,
                             WINDOW, True, BLOCK, DIM)
    tl.store(Out + at, (acc / total[:, None]).to(tl.bfloat16))


def best_sparse(q, k, v, keep, window, prefix):
    """Best microseconds over tile shapes; the layout of survivors is not timed."""
    dim, tokens = q.shape[-1], q.shape[2]
    capacity = int(keep.sum(-1).max()) + 256
    compact_k = torch.zeros(KV_HEADS, capacity, dim, device="cuda", dtype=torch.bfloat16)
    compact_v = torch.zeros_like(compact_k)
    for head in range(KV_HEADS):
        kept = keep[head].nonzero()[:, 0]
        compact_k[head, :len(kept)], compact_v[head, :len(kept)] = k[0, head, kept], v[0, head, kept]
    before = F.pad(keep.int().cumsum(-1), (1, 0))
    bits, out = keep.to(torch.int8).contiguous(), torch.empty_like(q)
    scale, best = dim**-0.5 / math.log(2), None
    for rows, block, warps, stages in ((128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2),
                                       (128, 128, 8, 3), (64, 64, 4, 3), (256, 64, 8, 3)):
        positions = rows // GROUP
        tiles = tokens // positions
        starts = (torch.arange(tiles, device="cuda") * positions - window).clamp(min=0)
        counts = before[:, starts].contiguous().int()

        def work():
            sparse_kernel[(tiles, KV_HEADS)](
                q, k, v, compact_k, compact_v, bits, counts, out, tokens, capacity, scale,
                WINDOW=window, ROWS=rows, BLOCK=block, DIM=dim, GROUP_SIZE=GROUP, PREFIX=prefix,
                num_warps=warps, num_stages=stages)
        try:
            work()
            us = timed(work, 3 if tokens > 100000 else 7)
        except Exception:  # a shape that the card has no room for
            continue
        if best is None or us < best:
            best = us
    return best, out


def check_sparse(q, k, v, keep, window, out):
    """Largest error of KV head 0's group over the last 512 queries against a dense mask."""
    tokens, last = q.shape[2], 512
    i = torch.arange(tokens - last, tokens, device="cuda")[:, None]
    j = torch.arange(tokens, device="cuda")[None, :]
    mask = (j <= i) & ((i - j <= window) | keep[0][None, :])
    want = F.scaled_dot_product_attention(
        q[:, :GROUP, -last:].float(), k[:, :1].float().expand(-1, GROUP, -1, -1),
        v[:, :1].float().expand(-1, GROUP, -1, -1), attn_mask=mask)
    return (want - out[:, :GROUP, -last:].float()).abs().max().item()


def proto(dim, name, tokens):
    q, k, v = inputs(dim, tokens)
    keep = torch.rand(KV_HEADS, tokens, device="cuda") < 1 / 8
    us, out = best_sparse(q, k, v, keep, 256, prefix=True)
    emit(f"prefill_proto/d{dim}/{name}", f"prefill/d{dim}/{name}", "Triton prefix + band", us,
         peer_error=check_sparse(q, k, v, keep, 256, out))


def one_pass(dim, name, tokens):
    if tokens != 32768:
        return
    q, k, v = inputs(dim, tokens)
    keep = torch.rand(KV_HEADS, tokens, device="cuda") < 1 / 8
    us, _ = best_sparse(q, k, v, keep, 256, prefix=False)
    emit(f"prefill_triton/d{dim}/{name}", f"prefill/d{dim}/{name}", "Triton, one masked pass", us)


def hub(dim, name, tokens):
    if dim != 128 or tokens != 8192:
        return
    q, k, v = inputs(dim, tokens)
    keep = torch.rand(KV_HEADS, tokens, device="cuda") < 1 / 8
    j = torch.arange(tokens, device="cuda")

    def work():
        for first in range(0, tokens, 512):
            last = first + 512
            i = j[first:last, None]
            mask = (j[None, :last] <= i) & ((i - j[None, :last] <= 256) | keep[:, None, :last])
            F.scaled_dot_product_attention(
                q[:, :, first:last], k[:, :, :last].repeat_interleave(GROUP, 1),
                v[:, :, :last].repeat_interleave(GROUP, 1),
                attn_mask=mask.repeat_interleave(GROUP, 0)[None])
    emit(f"prefill_hub/d{dim}/{name}", f"prefill/d{dim}/{name}", "chunked SDPA, dense masks",
         timed(work, 5))


def model_optimizer(dim, name, tokens):
    if dim != 128:  # flex_attention at 64 is slower than at 128 for reasons of its own
        return
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    flex = torch.compile(flex_attention, dynamic=False)
    window, chunk = 256, 4096

    @torch.compile(dynamic=False)
    def merge(a, log_a, b, log_b):
        top = torch.maximum(log_a, log_b)
        wa, wb = (log_a - top).exp(), (log_b - top).exp()
        return ((a * wa[..., None] + b * wb[..., None]) / (wa + wb)[..., None]).to(torch.bfloat16)

    q, k, v = inputs(dim, tokens)
    keep = torch.rand(KV_HEADS, tokens, device="cuda") < 1 / 8
    total, flex_us, weight = 0.0, {}, 1
    for n in range(tokens // chunk):
        if tokens > 32768 and n > 1 and n % 4:  # every fourth of a long run, four times
            continue
        weight = 4 if tokens > 32768 and n > 1 else 1
        back = 0 if n == 0 else window + 1
        first = n * chunk - back
        queries = q[:, :, n * chunk:(n + 1) * chunk].contiguous()
        keys, values = (x[:, :, first:(n + 1) * chunk].contiguous() for x in (k, v))
        if back not in flex_us:
            bits = keep[:, first:(n + 1) * chunk].contiguous()

            def mask(_, head, i, j):
                return (i + back >= j) & ((i + back - j <= window) | bits[head // GROUP, j])
            blocks = create_block_mask(mask, 1, QUERY_HEADS, chunk, chunk + back, device="cuda")
            flex_us[back] = timed(lambda: flex(queries, keys, values, block_mask=blocks,
                                               enable_gqa=True, return_lse=True), 5)
        us, survivors = flex_us[back], max(0, first) // 8
        if survivors:
            old = torch.randn(1, QUERY_HEADS, survivors, dim, device="cuda", dtype=torch.bfloat16)
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            us += timed(lambda: flash(queries, old, old, 0.0, False), 5)
            lse = torch.randn(1, QUERY_HEADS, chunk, device="cuda")
            us += timed(lambda: merge(queries, lse, queries, lse), 5)
        total += us * weight
    emit(f"prefill_mo/d{dim}/{name}", f"prefill/d{dim}/{name}",
         "Model-Optimizer's way: flex + flash chunks", total)


PEERS = {"cudnn": cudnn, "proto": proto, "mo": model_optimizer, "triton": one_pass, "hub": hub}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--lengths", default=",".join(LENGTHS))
    parser.add_argument("--dims", default="128,64")
    args = parser.parse_args()
    torch.manual_seed(0)
    measure_ceilings()
    for peer in args.peers.split(","):
        for dim in map(int, args.dims.split(",")):
            for name in args.lengths.split(","):
                try:
                    PEERS[peer](dim, name, LENGTHS[name])
                except Exception as error:  # the other peers' rows are worth having
                    print(json.dumps({"peer_error": f"{peer} d{dim} {name}: {error}"[:300]}),
                          flush=True)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
