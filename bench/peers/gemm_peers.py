#!/usr/bin/env python3
"""Times torch's products by large weights, on gemm_gpu_bench's shapes: JSON lines.

BF16 by cuBLAS, and torch._scaled_mm of e4m3 with a scale a row, x quantized before. Each case is a
CUDA graph of products by weights of their own, many times the L2 cache together and flushed from
it before each replay; medians. Needs torch.

  bench/peers/gemm_peers.py [--rows 1,16]
"""
import argparse
import json
import statistics

import torch

from l2_cache import flush_l2

SHAPES = {"qwen3_8b_gate_up": (24576, 4096), "qwen3_8b_down": (4096, 12288),
          "llama_1b_gate_up": (16384, 2048)}
LAUNCHES = 24


def timed(work, runs=9):
    """Median microseconds of a graph of work(0), ..., work(LAUNCHES - 1), of one of them."""
    for i in range(3):
        work(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(LAUNCHES):
            work(i)
    times = []
    for turn in range(-2, runs):
        flush_l2()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 0:
            times.append(1e3 * begin.elapsed_time(end) / LAUNCHES)
    return statistics.median(times)


def emit(case, peer, us):
    print(json.dumps({"case": case.replace("gemv", "gemv_torch", 1), "ours_case": case,
                      "peer": peer, "peer_us": round(us, 2)}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,16")
    args = parser.parse_args()
    torch.manual_seed(0)
    for name, (n, k) in SHAPES.items():
        for fp8 in (False, True):
            copies = min(LAUNCHES, (3 << 29) // (n * k * (1 if fp8 else 2)) + 1)
            w = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
            if fp8:
                w = [x.to(torch.float8_e4m3fn) for x in w]
                w_scale = torch.rand(1, n, device="cuda") + 0.5
            for rows in map(int, args.rows.split(",")):
                x = torch.randn(rows, k, device="cuda", dtype=torch.bfloat16)
                if fp8:
                    x, x_scale = x.to(torch.float8_e4m3fn), torch.rand(rows, 1, device="cuda") + 0.5

                    def work(i):
                        torch._scaled_mm(x, w[i % copies].t(), scale_a=x_scale, scale_b=w_scale,
                                         out_dtype=torch.bfloat16)
                else:
                    def work(i):
                        torch.mm(x, w[i % copies].t())
                case = f"gemv/{name}_{'fp8' if fp8 else 'bf16'}/m{rows}"
                try:
                    emit(case, "torch._scaled_mm, row scales" if fp8 else "torch BF16 (cuBLAS)",
                         timed(work))
                except Exception as error:  # the other rows are worth having
                    print(json.dumps({"peer_error": f"{case}: {error}"[:300]}), flush=True)


if __name__ == "__main__":
    main()
