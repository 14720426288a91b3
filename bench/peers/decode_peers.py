#!/usr/bin/env python3
"""Times what the compact decode attention is measured against, on the same contexts: JSON lines.

32 query and 8 KV heads. As in compact_decode_bench, a case is a CUDA graph of several layers with
KV of their own, which the L2 cache does not hold when it begins; the median over replays, by the
layer. Every peer's output is compared with attention in FP32 before its time is printed.

  flashinfer  dense attention over an e4m3 cache of pages in random order: the best of its XQA and
              FA2 kernels, the latter with tensor cores and without; the host's plan is not timed
  fastdms     its compact split-K kernel and the reduction, on as many live tokens a head as ours:
              the window, the newest and an eighth of the older ones of 8192

They come from PyPI and are not installed by anything here (INSTALL below). flashinfer compiles a
kernel at its first use, half a minute each or two (nvcc, ninja).

  bench/peers/decode_peers.py [--peers flashinfer,fastdms] [--sweep]
"""
import argparse
import importlib.util
import json
import math
import os
import pathlib
import statistics
import sys

import torch

from l2_cache import flush_l2

INSTALL = ("pip install --no-deps flashinfer-python==0.6.16.post4 fastdms==0.2.0; "
           "pip install apache-tvm-ffi filelock jinja2 requests tqdm nvidia-ml-py ninja")
QUERY_HEADS, KV_HEADS, WINDOW = 32, 8, 256
GROUP = QUERY_HEADS // KV_HEADS
FLASHINFER = {"128k_b1": (131072, 1, 16), "32k_b8": (32768, 8, 8)}  # context, batch, layers
FASTDMS = {"b1": (1, 36), "b8": (8, 36)}  # batch, layers
# The first were best on an H200; --sweep tries them all. Kernel, page, layout, tokens of a split
# (0: what its plan chooses).
KERNELS = [("xqa", 64, "HND", 0), ("fa2_tensor_cores", 16, "HND", 0),
           ("fa2_tensor_cores", 64, "HND", 0), ("fa2_tensor_cores", 16, "HND", 1024),
           ("fa2_tensor_cores", 16, "HND", 2048), ("fa2_tensor_cores", 16, "HND", 4096),
           ("fa2_tensor_cores", 16, "HND", 8192), ("fa2_tensor_cores", 32, "HND", 0),
           ("fa2_tensor_cores", 16, "NHD", 0), ("xqa", 128, "HND", 0), ("xqa", 32, "HND", 0),
           ("xqa", 128, "NHD", 0), ("xqa", 64, "NHD", 0), ("fa2", 16, "HND", 0),
           ("fa2", 64, "HND", 0), ("fa2", 16, "NHD", 0)]
# Keys of a split, warps of its program, warps of the reduction's.
SPLITS = [(128, 4, 4), (64, 2, 4), (64, 4, 4), (64, 2, 8), (64, 4, 1), (64, 4, 2), (64, 4, 8),
          (128, 2, 4), (128, 4, 2), (128, 8, 4), (256, 4, 4), (256, 8, 4), (512, 8, 4), (32, 1, 4),
          (32, 2, 4), (32, 4, 4), (16, 1, 4), (16, 2, 4), (16, 4, 4)]
TRIED = 3


def layer_us(layers, work):
    """Median microseconds of a layer: `work(layer)` for all of them in one CUDA graph."""
    for layer in range(layers):
        work(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(layers):
            work(layer)
    times = []
    for turn in range(-2, 15):
        flush_l2()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 0:
            times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times) / layers


def random_codes(*shape):
    out = torch.empty(shape, device="cuda", dtype=torch.float8_e4m3fn)
    for part in out:  # a layer
        part.copy_(torch.randn(part.shape, device="cuda"))
    return out


def rows(codes, index):
    return codes.view(torch.uint8)[index].view(codes.dtype)  # torch does not index e4m3


def error_of(out, q, k, v):
    """Of one sequence's query heads [32, d] over [tokens, 8, d]: the norm of the error by that of
    attention in FP32."""
    keys, values = (x.float().transpose(0, 1) for x in (k, v))
    p = (q.float().view(KV_HEADS, GROUP, -1) @ keys.transpose(1, 2) / q.shape[-1]**0.5).softmax(-1)
    want = (p @ values).reshape(q.shape)
    return ((out.float() - want).norm() / want.norm()).item()


def emit(case, ours, peer, us, **more):
    print(json.dumps({"case": case, "ours_case": ours, "peer": peer, "peer_us": round(us, 2),
                      **more}), flush=True)


def best(settings, measure):
    """Runs `measure(*setting)`, which returns microseconds and an error; the fastest of those."""
    results = []
    for setting in settings:
        try:
            us, error = measure(*setting)
        except Exception as failure:  # a setting that this card or package has no kernel for
            print(f"{setting}: {str(failure)[:300]}", file=sys.stderr, flush=True)
            continue
        print(f"{setting}: {us:.2f} us, error {error:.2g}", file=sys.stderr, flush=True)
        results.append((us, setting, error))
    if not results:
        raise RuntimeError("no setting ran")
    return min(results)


def flashinfer_case(name, sweep):
    import flashinfer

    tokens, batch, layers = FLASHINFER[name]
    dim, scale = 128, 128**-0.5
    q = torch.randn(batch, QUERY_HEADS, dim, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    memory = random_codes(layers, 2, batch * tokens * KV_HEADS * dim)
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")
    lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")

    def measure(kernel, page, layout, split):
        pages = tokens // page
        order = torch.randperm(batch * pages, device="cuda", dtype=torch.int32)
        shape = {"HND": (KV_HEADS, page, dim), "NHD": (page, KV_HEADS, dim)}[layout]
        caches = [tuple(part.view(batch * pages, *shape) for part in layer) for layer in memory]
        out.fill_(math.nan)
        if kernel == "xqa":
            workspace.zero_()

            def work(layer):
                flashinfer.decode.xqa_batch_decode_with_kv_cache(
                    q, caches[layer], workspace, order.view(batch, pages), lengths, tokens,
                    bmm1_scale=scale, bmm2_scale=1.0, out=out, kv_layout=layout)
        else:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, layout, use_tensor_cores=kernel != "fa2", backend="fa2")
            wrapper.plan(torch.arange(batch + 1, dtype=torch.int32, device="cuda") * pages, order,
                         torch.full((batch,), page, dtype=torch.int32, device="cuda"), QUERY_HEADS,
                         KV_HEADS, dim, page, q_data_type=torch.bfloat16,
                         kv_data_type=torch.float8_e4m3fn, sm_scale=scale,
                         fixed_split_size=split // page or None)

            def work(layer):
                wrapper.run(q, caches[layer], out=out)
        us = layer_us(layers, work)
        k, v = (rows(cache, order[-pages:].long()) for cache in caches[-1])
        if layout == "HND":
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        error = error_of(out[-1], q[-1], k.reshape(tokens, KV_HEADS, dim),
                         v.reshape(tokens, KV_HEADS, dim))
        if not error < 2**-4:  # XQA rounds the queries and p to e4m3: 2^-4 each at most
            raise ValueError(f"wrong output: error {error}")
        return us, error

    us, setting, error = best(KERNELS if sweep else KERNELS[:TRIED], measure)
    emit(f"decode_flashinfer/{name}", f"decode/{name}", "flashinfer, dense FP8", us,
         setting=setting, peer_error=error, version=flashinfer.__version__, layers=layers)


def fastdms_kernels():
    """The module of its kernels alone: the package's own imports need flash-attn."""
    package = importlib.util.find_spec("fastdms")
    if package is None:
        raise ImportError("fastdms is not installed")
    path = pathlib.Path(package.submodule_search_locations[0]) / "layers/compact_attention.py"
    spec = importlib.util.spec_from_file_location("fastdms_compact_attention", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class WithWarps:
    """A Triton kernel whose launches get `num_warps`."""

    def __init__(self, kernel, warps):
        self.kernel, self.warps = kernel, warps

    def __getitem__(self, grid):
        return lambda *args: self.kernel[grid](*args, num_warps=self.warps)


def fastdms_case(dim, name, sweep):
    module = fastdms_kernels()
    partial = module._compact_decode_grouped_splitk_partial_kernel
    reduction = module._compact_decode_grouped_splitk_reduce_kernel
    batch, layers = FASTDMS[name]
    live = WINDOW + 1 + (8192 - WINDOW - 1) // 8
    spans = batch * KV_HEADS
    q = torch.randn(batch, QUERY_HEADS, dim, device="cuda", dtype=torch.bfloat16)
    memory = random_codes(layers, 2, spans * live * dim).view(layers, 2, spans * live, dim)
    base = (torch.randperm(spans, device="cuda") * live).view(batch, KV_HEADS).int()
    counts = torch.full_like(base, live)
    outs = [None] * layers

    def measure(block, warps, reduce_warps):
        module._COMPACT_ATTN_SPLITK_BLOCK_N = block
        module._compact_decode_grouped_splitk_partial_kernel = WithWarps(partial, warps)
        module._compact_decode_grouped_splitk_reduce_kernel = WithWarps(reduction, reduce_warps)

        def work(layer):
            outs[layer] = module.compact_decode_attention(
                q, memory[layer, 0], memory[layer, 1], base, counts, max_live_count=live)
        us = layer_us(layers, work)
        of_last = base[-1][:, None].long() + torch.arange(live, device="cuda")
        k, v = (rows(memory[-1, i], of_last).transpose(0, 1) for i in (0, 1))
        error = error_of(outs[-1][-1], q[-1], k, v)
        if not error < 2**-7:  # at most TF32 products and an output in BF16
            raise ValueError(f"wrong output: error {error}")
        return us, error

    us, setting, error = best(SPLITS if sweep else SPLITS[:TRIED], measure)
    emit(f"decode_fastdms/d{dim}_{name}", f"decode_{name}/d{dim}/8k", "FastDMS compact decode", us,
         setting=setting, peer_error=error, live=live, layers=layers)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default="flashinfer,fastdms")
    parser.add_argument("--sweep", action="store_true", help="try every setting")
    args = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{major}.{minor}a")
    torch.manual_seed(0)
    cases = []
    if "flashinfer" in args.peers:
        cases += [(flashinfer_case, (name, args.sweep)) for name in FLASHINFER]
    if "fastdms" in args.peers:
        cases += [(fastdms_case, (dim, name, args.sweep)) for dim in (128, 64) for name in FASTDMS]
    for measure, arguments in cases:
        try:
            measure(*arguments)
        except Exception as failure:  # the other rows are worth having
            hint = f"; {INSTALL}" if isinstance(failure, ImportError) else ""
            print(json.dumps({"failed": f"{measure.__name__}{arguments}: {failure}"[:300] + hint}),
                  flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
