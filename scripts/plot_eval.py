"""Draws the results of `winnow eval --json`. Run by scripts/plot."""

import argparse
import json
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def load(path):
    """The runs of a result file: one for each context."""
    with open(path, encoding="utf-8") as file:
        result = json.load(file)
    runs = result.get("contexts", [result])
    for run in runs:
        if "context" not in run or not isinstance(run.get("modes"), dict):
            raise ValueError("no result of winnow eval")
        for name, row in run["modes"].items():
            missing = {"kld", "kv_bytes", "kv_bytes_dense_bf16", "memory"} - row.keys()
            if missing:
                raise ValueError(f"mode {name} lacks {', '.join(sorted(missing))}")
    return runs


def draw_quality(runs, path):
    """KL divergence to dense-bf16 against the cache's share of dense-bf16's bytes."""
    figure, axes = plt.subplots(figsize=(7, 5))
    curves = {}
    for run in runs:
        for name, row in run["modes"].items():
            if row["kld"] > 0:
                key = (name.partition("@")[0], run["context"])
                share = row["kv_bytes"] / row["kv_bytes_dense_bf16"]
                curves.setdefault(key, set()).add((share, row["kld"]))
    for (mode, context), points in sorted(curves.items()):
        xs, ys = zip(*sorted(points))
        axes.plot(xs, ys, marker="o", label=f"{mode}, {context} tokens")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="KV bytes / dense-bf16's",
        ylabel="KL divergence to dense-bf16, nats a token",
    )
    # Whole parts of the dense cache's bytes, those that the curves span.
    low, high = axes.get_xlim()
    parts = [n for n in (32, 24, 16, 12, 8, 6, 4, 3, 2, 1) if low <= 1 / n <= high]
    axes.set_xticks([1 / n for n in parts], [f"1/{n}" for n in parts])
    axes.set_xticks([], minor=True)
    axes.grid(True, which="both", alpha=0.3)
    if curves:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_memory(runs, path):
    """Bytes held against tokens seen, for the longest context."""
    run = max(runs, key=lambda run: run["context"])
    figure, axes = plt.subplots(figsize=(7, 5))
    dense = {}
    for name, row in sorted(run["modes"].items()):
        points = sorted((p["tokens"], p["kv_bytes"], p["kv_bytes_dense_bf16"]) for p in row["memory"])
        axes.plot([p[0] for p in points], [p[1] / 1e6 for p in points], marker=".", label=name)
        dense.update({p[0]: p[2] for p in points})
    if "dense-bf16" not in run["modes"]:
        tokens = sorted(dense)
        axes.plot(tokens, [dense[t] / 1e6 for t in tokens], "k--", label="dense-bf16")
    axes.set(xlabel="tokens", ylabel="KV cache, MB", ylim=(0, None), xlim=(0, None))
    axes.grid(True, alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_keep_rate(name, rates, path):
    """Share of the tokens flagged to keep, [layers][KV heads]."""
    figure, axes = plt.subplots(figsize=(max(6, 0.25 * len(rates)), 2.5))
    image = axes.imshow(list(zip(*rates)), aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="layer", ylabel="KV head", title=f"kept share, {name}")
    axes.set_yticks(range(len(rates[0])))
    figure.colorbar(image)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(prog="scripts/plot", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULT.json", help="what winnow eval --json wrote")
    parser.add_argument("--out", default=".", metavar="DIR", help="where the images go (default: here)")
    args = parser.parse_args()
    runs = []
    for path in args.results:
        try:
            runs += load(path)
        except (OSError, ValueError) as error:
            sys.exit(f"scripts/plot: {path}: {error}")
    os.makedirs(args.out, exist_ok=True)
    written = ["quality.png", "memory.png"]
    draw_quality(runs, os.path.join(args.out, "quality.png"))
    draw_memory(runs, os.path.join(args.out, "memory.png"))
    longest = max(runs, key=lambda run: run["context"])
    for name, row in longest["modes"].items():
        if name.startswith("dms-") and "keep_rate" in row:
            written.append(f"keep_rate-{name.replace('@', '_')}.png")
            draw_keep_rate(name, row["keep_rate"], os.path.join(args.out, written[-1]))
    print(*(os.path.join(args.out, name) for name in written), sep="\n")


if __name__ == "__main__":
    main()
