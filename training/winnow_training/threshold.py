"""Chooses an adapter's decision threshold on held-out text: `python -m winnow_training.threshold FIGURES.json ...`.

The figures are what `winnow_training.evaluate` wrote with several thresholds. Chosen is the smallest multiple of
`--step` at which the divergence, interpolated between the measured thresholds, is at most `--kld` on every text.
"""

import argparse
import json
import math
from pathlib import Path


def curve(result: dict) -> list[tuple[float, float, float]]:
  """(threshold beside the trained offset of 5, KLD, live ratio) of one text, ascending."""
  beside = result.get("offset", 5.0) - 5.0
  points = [(float(mode.removeprefix("dms@")) + beside, f["kld"], f["live_ratio"])
            for mode, f in result["modes"].items() if mode.startswith("dms@")]
  return sorted(points)


def at(points: list[tuple[float, float, float]], threshold: float) -> tuple[float, float]:
  """KLD and live ratio at a threshold between measured ones, linearly. ValueError outside them."""
  for (t0, *low), (t1, *high) in zip(points, points[1:]):
    if t0 <= threshold <= t1:
      share = (threshold - t0) / (t1 - t0)
      return tuple(a + share * (b - a) for a, b in zip(low, high))
  raise ValueError(f"threshold {threshold:g} lies outside the measured {points[0][0]:g} to {points[-1][0]:g}")


def choose(curves: dict[str, list[tuple[float, float, float]]], kld: float, step: float) -> float:
  """The smallest multiple of `step` with at most `kld` on every text; ValueError if none of the measured range has."""
  low, high = max(c[0][0] for c in curves.values()), min(c[-1][0] for c in curves.values())
  for i in range(math.ceil(low / step), math.floor(high / step) + 1):
    if all(at(c, i * step)[0] <= kld for c in curves.values()):
      return i * step
  raise ValueError(f"no threshold from {low:g} to {high:g} keeps every text at or under {kld:g}")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("figures", type=Path, nargs="+")
  parser.add_argument("--kld", type=float, default=0.0175)
  parser.add_argument("--step", type=float, default=0.25)
  parser.add_argument("--write", type=Path, help="adapter folder whose metadata takes the offset")
  args = parser.parse_args()
  results = [r for path in args.figures for r in (lambda x: x if isinstance(x, list) else [x])(json.loads(path.read_text()))]
  curves = {f"{r['text']} at {r['context']}": curve(r) for r in results}
  chosen = choose(curves, args.kld, args.step)
  print(f"threshold {chosen:+g}: offset {5.0 + chosen:g}")
  for name, points in curves.items():
    kld, live = at(points, chosen)
    print(f"  {name}: kld {kld:.5f}  live {live:.3f}x")
  if args.write:
    file = args.write / "dms_metadata.json"
    metadata = json.loads(file.read_text()) | {"dms_initial_alpha_offset": 5.0 + chosen}
    file.write_text(json.dumps(metadata, indent=1) + "\n")


if __name__ == "__main__":
  main()
