#!/usr/bin/env python3
"""Times `winnow bench engine` beside a native llama-bench on this machine.

Both run the default model with BF16 weights, alternated so that a neighbour's noise hits both;
the medians and their ratio are printed and written to bench/results/. How to build the peer:
docs/benchmarks.md.

  bench/peers/cpu_engine.py --llama-bench PATH/llama-bench --gguf PATH/SmolLM2-BF16.gguf
"""
import argparse
import datetime
import json
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def cpu_name():
    for line in open("/proc/cpuinfo", encoding="utf-8"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


def run(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def ours(args, json_path):
    run([args.winnow, "bench", "engine", "--threads", str(args.threads), "--kv-mode", args.kv_mode,
         "--prompts", "512", "--depths", ",".join(map(str, args.depths)), "--generate", "64",
         "--repetitions", "3", "--json", json_path])
    result = json.load(open(json_path, encoding="utf-8"))
    figures = {}
    for row in result["rows"]:
        name = (f"prefill {row['tokens']}" if row["test"] == "prefill"
                else f"decode at depth {row['depth']}")
        figures[name] = row["tokens_per_second"]
    return figures, result["cpu_path"]


def peer(args):
    command = [args.llama_bench, "-m", args.gguf, "-t", str(args.threads), "-o", "json", "-r", "3"]
    figures = {}
    rows = json.loads(run(command + ["-p", "512", "-n", "64"]))
    for depth in args.depths:
        if depth:
            rows += json.loads(run(command + ["-p", "0", "-n", "64", "-d", str(depth)]))
    for row in rows:
        name = (f"prefill {row['n_prompt']}" if row["n_prompt"]
                else f"decode at depth {row.get('n_depth', 0)}")
        figures[name] = row["avg_ts"]
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--gguf", required=True, help="the default model as a BF16 GGUF")
    parser.add_argument("--winnow", default=str(ROOT / "build/release/bin/winnow"))
    parser.add_argument("--kv-mode", default="dense-bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depths", type=lambda s: [int(x) for x in s.split(",")], default=[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="JSON file; default bench/results/DATE-cpu-engine.json")
    args = parser.parse_args()

    date = datetime.date.today().isoformat()
    out = pathlib.Path(args.out or ROOT / f"bench/results/{date}-cpu-engine.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    mine, theirs = {}, {}
    for turn in range(args.rounds):
        figures, path = ours(args, str(out) + ".part")
        for name, value in figures.items():
            mine.setdefault(name, []).append(value)
        for name, value in peer(args).items():
            theirs.setdefault(name, []).append(value)
        print(f"round {turn + 1} of {args.rounds} done", file=sys.stderr)
    pathlib.Path(str(out) + ".part").unlink()
    rows = []
    for name in mine:
        a, b = statistics.median(mine[name]), statistics.median(theirs[name])
        rows.append({"case": name, "ours_tokens_per_second": a, "peer": "llama.cpp",
                     "peer_tokens_per_second": b, "ratio": a / b,
                     "ours_all": mine[name], "peer_all": theirs[name]})
        print(f"{name:24} ours {a:9.1f} tok/s   llama.cpp {b:9.1f} tok/s   {a / b:5.2f}x")
    head = {
        "date": date, "machine": f"{cpu_name()}, {args.threads} threads", "cpu_path": path,
        "commit": run(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip(),
        "command": f"bench/peers/cpu_engine.py --kv-mode {args.kv_mode} --threads {args.threads} "
                   f"--depths {','.join(map(str, args.depths))} --rounds {args.rounds}",
        "rows": rows,
    }
    out.write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")
    print(f"written to {out}", file=sys.stderr)


if __name__ == "__main__":
    main()
