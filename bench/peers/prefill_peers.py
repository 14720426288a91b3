#!/usr/bin/env python3
"""Times what the sparse prefill is measured against, on the same shapes: JSON lines.

One layer, batch 1, 32 query and 8 KV heads, BF16, random data; medians of runs that find the L2
cache flushed. Needs torch and triton. Every peer is re-expressed here from its published algorithm,
and its output is compared with attention under a dense mask before its time is printed:

  cudnn      torch SDPA, dense causal, cuDNN forced
  proto      prefix and band in Triton, attention alone (its compaction is not timed)
  mo         NVIDIA Model-Optimizer: 4096-token chunks; flex_attention over the last window + 1
             tokens and the chunk, flash attention over the survivors, merged by log-sum-exp
             (attention alone: neither the masks nor the dropping of evicted keys is timed)
  triton     one pass over all keys with the mask applied to scores, in Triton, as
             westers/kvcompress has it: a program a query head and tile of queries, natural
             exponentials, guards against rows that see nothing; `lean_us` is without the last two
  hub        SDPA over chunks of 512 queries with a dense mask

  bench/peers/prefill_peers.py [--peers cudnn,proto] [--lengths 8k,32k,128k] [--dims 128,64]
      [--sweep]
"""
import argparse
import itertools
import json
import math
import statistics
import sys

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from l2_cache import flush_l2

QUERY_HEADS, KV_HEADS = 32, 8
GROUP = QUERY_HEADS // KV_HEADS
WINDOW = 256
LENGTHS = {"8k": 8192, "32k": 32768, "128k": 131072}
# Rows, keys, warps, stages of a Triton program, and options of flex_attention. The first of a kind
# were best on an H200; --sweep tries them all.
TILES = {128: ((64, 64, 4, 3), (256, 64, 8, 3), (128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3),
               (128, 128, 8, 3)),
         64: ((64, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2), (256, 64, 8, 3),
              (128, 128, 8, 3))}
TILES_TRIED = 2
FLEX_OPTIONS = ({"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}, None)


def timed(work, runs, graph=False):
    """Median microseconds. `graph`: of a CUDA graph, for work of many launches."""
    if graph:
        work()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work()
        work = captured.replay
    times = []
    for turn in range(-2, runs):
        flush_l2()
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


def random_keep(tokens):
    return torch.rand(KV_HEADS, tokens, device="cuda") < 1 / 8


def runs_for(tokens):
    return {8192: 15, 32768: 9}.get(tokens, 3)


def checked(q, k, v, keep, out):
    """The largest error of `out` in units of its row's sum of p |v|; raises where it is too large.

    A peer rounds p and the output to BF16, and mo rounds two partial outputs before it merges them:
    2^-9 each of that unit; the rest is FP32, whose share is small. A wrong key shows as 2^-3.
    """
    tokens, worst = q.shape[2], 0.0
    j = torch.arange(tokens, device="cuda")[None, :]
    for head in (0, KV_HEADS - 1):
        keys, values = k[0, head].float(), v[0, head].float()
        for first in (0, tokens // 2 - 256, tokens - 512):
            i = torch.arange(first, first + 512, device="cuda")[:, None]
            seen = (j <= i) & ((i - j <= WINDOW) | keep[head][None, :])
            rows = (0, slice(head * GROUP, (head + 1) * GROUP), slice(first, first + 512))
            p = (q[rows].float() @ keys.T * q.shape[-1]**-0.5).masked_fill(~seen, -math.inf)
            p = p.softmax(-1)
            error = (p @ values - out[rows].float()).abs() / (p @ values.abs())
            worst = max(worst, error.nan_to_num(math.inf).max().item())
    if worst > 4 * 2**-9:
        raise ValueError(f"wrong output: error {worst}")
    return round(worst, 6)


def measure_ceilings():
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    gemm = 2 * 8192**3 / timed(lambda: a @ b, 10) / 1e6
    one = torch.ones((), device="cuda")
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    fp8 = 2 * 8192**3 / timed(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16),
                              10) / 1e6
    x = torch.randn(1 << 28, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = 4 * x.numel() / timed(lambda: y.copy_(x), 10) / 1e3
    print(json.dumps({"ceilings": {"gemm_tflops": round(gemm, 1), "gemm_fp8_tflops": round(fp8, 1),
                                    "copy_gbps": round(copy, 1)}}),
          flush=True)


def cudnn(dim, name, tokens, _):
    q, k, v = inputs(dim, tokens)
    work = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        error = checked(q, k, v, torch.ones(KV_HEADS, tokens, device="cuda", dtype=torch.bool),
                        work())
        us = timed(work, runs_for(tokens))
    tail = f"d{dim}/{name}"
    cases = ["prefill", "prefill_keep35"]
    if dim == 128:
        cases += ["prefill_w512"] * (tokens == 32768) + ["prefill_dense"] * (tokens <= 32768)
    for case in cases:
        emit(f"{case}/{tail}", f"{case}/{tail}", "cuDNN SDPA, dense causal", us, peer_error=error)


@triton.jit
def attend(q, keys, values, pos, first, last, keep, top, total, acc, scale, WINDOW: tl.constexpr,
           MASK: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Online softmax over keys [first, last). MASK 2: the window and keep bits decide; 3: so they
    do in the form that triton has; 1: all keys are seen; 0: the same, and whole blocks of them."""
    column, dims = tl.arange(0, BLOCK), tl.arange(0, DIM)
    for start in range(first, last, BLOCK):
        j = start + column
        inside = j < last
        if MASK == 0:
            k = tl.load(keys + j[None, :] * DIM + dims[:, None])
        else:
            k = tl.load(keys + j[None, :] * DIM + dims[:, None], mask=inside[None, :], other=0.0)
        x = tl.dot(q, k) * scale
        if MASK >= 2:
            kept = tl.load(keep + j, mask=inside, other=0)
            near = pos[:, None] - j[None, :] <= WINDOW
            seen = (j[None, :] <= pos[:, None]) & (near | (kept[None, :] != 0))
            x = tl.where(seen, x, float("-inf") if MASK == 3 else -1e30)
        elif MASK == 1:
            x = tl.where(inside[None, :], x, -1e30)
        new_top = tl.maximum(top, tl.max(x, 1))
        if MASK == 3:
            shrink = tl.where(top > float("-inf"), tl.exp(top - new_top), 0.0)
            p = tl.where(new_top[:, None] > float("-inf"), tl.exp(x - new_top[:, None]), 0.0)
            p = tl.where(seen, p, 0.0)
        else:
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(x - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        if MASK == 0:
            v = tl.load(values + j[:, None] * DIM + dims[None, :])
        else:
            v = tl.load(values + j[:, None] * DIM + dims[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(tl.bfloat16), v, acc * shrink[:, None])
        top = new_top
    return top, total, acc


@triton.jit
def sparse_kernel(Q, K, V, CompactK, CompactV, Keep, Counts, Out, tokens, capacity, scale,
                  WINDOW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                  DIM: tl.constexpr, PACK: tl.constexpr, GROUP_SIZE: tl.constexpr,
                  PREFIX: tl.constexpr, MASK: tl.constexpr):
    """PACK query heads of a KV head share a program. PREFIX: survivors from the compact tensors,
    then the band; else all keys, masked. MASK: 2 or 3, see attend."""
    POSITIONS: tl.constexpr = ROWS // PACK
    tiles = tl.num_programs(0)
    tile, first_head = tiles - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64) * PACK
    head = first_head // GROUP_SIZE
    row, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    first = tile * POSITIONS
    pos = first + row // PACK
    at = ((first_head + row % PACK) * tokens + pos)[:, None] * DIM + dims[None, :]
    q = tl.load(Q + at)
    top = tl.full([ROWS], float("-inf") if MASK == 3 else -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM], tl.float32)
    dense = 0
    if PREFIX:
        count = tl.load(Counts + head * tiles + tile)
        keys, values = CompactK + head * capacity * DIM, CompactV + head * capacity * DIM
        whole = count // BLOCK * BLOCK
        top, total, acc = attend(q, keys, values, pos, 0, whole, Keep, top, total, acc, scale,
                                 WINDOW, 0, BLOCK, DIM)
        top, total, acc = attend(q, keys, values, pos, whole, count, Keep, top, total, acc, scale,
                                 WINDOW, 1, BLOCK, DIM)
        dense = tl.maximum(0, first - WINDOW)
    top, total, acc = attend(q, K + head * tokens * DIM, V + head * tokens * DIM, pos, dense,
                             first + POSITIONS, Keep + head * tokens, top, total, acc, scale,
                             WINDOW, MASK, BLOCK, DIM)
    tl.store(Out + at, (acc / total[:, None]).to(tl.bfloat16))


def compacted(x, keep):
    """The survivors of each KV head in order, [heads, most of a head, dim], zeros behind."""
    most = (int(keep.sum(-1).max()) + 127) // 128 * 128
    out = torch.zeros(KV_HEADS, most, x.shape[-1], device="cuda", dtype=x.dtype)
    for head in range(KV_HEADS):
        kept = keep[head].nonzero()[:, 0]
        out[head, :len(kept)] = x[0, head, kept]
    return out


def best_sparse(q, k, v, keep, prefix, mask, tiles):
    """Of the best tile: microseconds, the tile, the output's error. `prefix`: a group's heads
    packed, prefix and band, the survivors' layout not timed; else one masked pass over all keys."""
    dim, tokens = q.shape[-1], q.shape[2]
    compact_k, compact_v = compacted(k, keep), compacted(v, keep)
    before = F.pad(keep.int().cumsum(-1), (1, 0))
    bits, out = keep.to(torch.int8).contiguous(), torch.empty_like(q)
    pack = GROUP if prefix else 1
    scale, best = dim**-0.5 / (1 if mask == 3 else math.log(2)), (math.inf, None, None)
    for rows, block, warps, stages in tiles:
        positions = rows // pack
        count = tokens // positions
        starts = (torch.arange(count, device="cuda") * positions - WINDOW).clamp(min=0)
        counts = before[:, starts].contiguous().int()

        def work():
            sparse_kernel[(count, QUERY_HEADS // pack)](
                q, k, v, compact_k, compact_v, bits, counts, out, tokens, compact_k.shape[1], scale,
                WINDOW=WINDOW, ROWS=rows, BLOCK=block, DIM=dim, PACK=pack, GROUP_SIZE=GROUP,
                PREFIX=prefix, MASK=mask, num_warps=warps, num_stages=stages)
        try:
            out.fill_(math.nan)
            work()
            us = timed(work, 3 if tokens > 100000 else 7)
        except triton.runtime.errors.OutOfResources:
            continue
        error = checked(q, k, v, keep, out)
        print(f"d{dim} {tokens} {'prefix' if prefix else 'one pass'}, mask {mask}, "
              f"{rows, block, warps, stages}: {us:.1f} us", file=sys.stderr, flush=True)
        best = min(best, (us, (rows, block, warps, stages), error))
    return best


def proto(dim, name, tokens, sweep):
    q, k, v = inputs(dim, tokens)
    tiles = TILES[dim] if sweep else TILES[dim][:TILES_TRIED]
    us, tile, error = best_sparse(q, k, v, random_keep(tokens), True, 2, tiles)
    emit(f"prefill_proto/d{dim}/{name}", f"prefill/d{dim}/{name}", "Triton prefix + band", us,
         peer_error=error, tile=tile)


def one_pass(dim, name, tokens, sweep):
    if tokens != 32768:
        return
    q, k, v = inputs(dim, tokens)
    keep = random_keep(tokens)
    tiles = TILES[dim] if sweep else TILES[dim][:1]
    us, tile, error = best_sparse(q, k, v, keep, False, 3, tiles)
    lean_us = best_sparse(q, k, v, keep, False, 2, tiles)[0]
    emit(f"prefill_triton/d{dim}/{name}", f"prefill/d{dim}/{name}", "Triton, one masked pass", us,
         peer_error=error, tile=tile, lean_us=round(lean_us, 2))


def hub(dim, name, tokens, _):
    if dim != 128 or tokens != 8192:
        return
    q, k, v = inputs(dim, tokens)
    keep = random_keep(tokens)
    j = torch.arange(tokens, device="cuda")
    out = torch.full_like(q, math.nan)

    def work():
        for first in range(0, tokens, 512):
            last = first + 512
            i = j[first:last, None]
            mask = (j[None, :last] <= i) & ((i - j[None, :last] <= WINDOW) | keep[:, None, :last])
            out[:, :, first:last] = F.scaled_dot_product_attention(
                q[:, :, first:last], k[:, :, :last].repeat_interleave(GROUP, 1),
                v[:, :, :last].repeat_interleave(GROUP, 1),
                attn_mask=mask.repeat_interleave(GROUP, 0)[None])
    us = timed(work, 5, graph=True)
    emit(f"prefill_hub/d{dim}/{name}", f"prefill/d{dim}/{name}", "chunked SDPA, dense masks", us,
         peer_error=checked(q, k, v, keep, out))


def even_keep(borders):
    """Random bits of which each KV head has an eighth between any two borders."""
    parts = []
    for first, last in zip(borders, borders[1:]):
        order = torch.rand(KV_HEADS, last - first, device="cuda").argsort(-1)
        parts.append(order < (last - first) // 8)
    return torch.cat(parts, 1)


def model_optimizer(dim, name, tokens, sweep):
    if dim != 128:  # flex_attention at 64 is slower than at 128 for reasons of its own
        return
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    flex, chunk = torch.compile(flex_attention, dynamic=False), 4096

    @torch.compile(dynamic=False)
    def merge(a, log_a, b, log_b, out):
        top = torch.maximum(log_a, log_b)
        wa, wb = (log_a - top).exp(), (log_b - top).exp()
        out.copy_((a * wa[..., None] + b * wb[..., None]) / (wa + wb)[..., None])

    def mask_of(back, bits):
        return lambda _, head, i, j: ((i + back >= j)
                                      & ((i + back - j <= WINDOW) | bits[head // GROUP, j]))

    q, k, v = inputs(dim, tokens)
    starts = [max(0, n * chunk - WINDOW - 1) for n in range(tokens // chunk)]
    keep = even_keep(starts + [tokens])
    compact_k, compact_v = compacted(k, keep)[None], compacted(v, keep)[None]
    parts = []
    for n, first in enumerate(starts):
        here, near = slice(n * chunk, (n + 1) * chunk), slice(first, (n + 1) * chunk)
        back, old = n * chunk - first, int(keep[0, :first].sum())
        blocks = create_block_mask(mask_of(back, keep[:, near].contiguous()), 1, QUERY_HEADS, chunk,
                                   chunk + back, device="cuda")
        parts.append((here, q[:, :, here].contiguous(), k[:, :, near].contiguous(),
                      v[:, :, near].contiguous(), blocks, compact_k[:, :, :old],
                      compact_v[:, :, :old]))
    out = torch.full_like(q, math.nan)

    def work(options):
        for here, queries, keys, values, blocks, old_keys, old_values in parts:
            local, log_local = flex(queries, keys, values, block_mask=blocks, enable_gqa=True,
                                    return_lse=True, kernel_options=options)
            if old_keys.shape[2] == 0:
                out[:, :, here] = local
                continue
            old, log_old = torch.ops.aten._scaled_dot_product_flash_attention(
                queries, old_keys, old_values, 0.0, False)[:2]
            merge(local, log_local, old, log_old, out[:, :, here])
    us = min(timed(lambda: work(options), runs_for(tokens), graph=True)
             for options in (FLEX_OPTIONS if sweep else FLEX_OPTIONS[:1]))
    emit(f"prefill_mo/d{dim}/{name}", f"prefill/d{dim}/{name}",
         "Model-Optimizer's way: flex + flash chunks", us, peer_error=checked(q, k, v, keep, out))


PEERS = {"cudnn": cudnn, "proto": proto, "mo": model_optimizer, "triton": one_pass, "hub": hub}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--lengths", default=",".join(LENGTHS))
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--sweep", action="store_true", help="try every tile of the Triton kernels")
    args = parser.parse_args()
    torch.manual_seed(0)
    # As in dms_prefill_bench short ones first: after long ones the GPU lowers its clocks a while.
    for name, dim, peer in itertools.product(
            args.lengths.split(","), map(int, args.dims.split(",")), args.peers.split(",")):
        try:
            PEERS[peer](dim, name, LENGTHS[name], args.sweep)
        except Exception as error:  # the other peers' rows are worth having
            print(json.dumps({"failed": f"{peer} d{dim} {name}: {error}"[:300]}), flush=True)
        torch.cuda.empty_cache()
    measure_ceilings()


if __name__ == "__main__":
    main()
