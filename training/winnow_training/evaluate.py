"""Quality of an adapter against the dense base: `python -m winnow_training.evaluate --model DIR --adapter DIR ...`.

The first K contiguous windows of N tokens of a text, no BOS, no overlap, all N - 1 predictions scored: perplexity,
KL(base || compressed), top-1 agreement, and the live ratio: logical over live tokens, summed over layers, heads and
windows at each window's last position, the window counted as live. Float32 arithmetic on BF16 weights unless told
otherwise, K and V rounded to the cache's type.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from winnow_training.adapter import load_student
from winnow_training.attention import BLOCK
from winnow_training.gate import LOGIT_OFFSET
from winnow_training.model import Gate, Model, model_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CHUNK = 1024


def live_tokens(logits: torch.Tensor, window: int) -> torch.Tensor:
  """Tokens visible at the last position, per layer and head. logits [L,1,G,T] -> [L,G]."""
  length = logits.shape[-1]
  keep = logits[:, 0, :, 1:] <= 0                      # The bit of token t + 1 decides token t.
  aged = torch.arange(length - 1, device=logits.device) < length - 1 - window
  return (keep | ~aged).sum(-1) + 1


class Totals:
  """Sums over the scored positions of one mode."""

  def __init__(self) -> None:
    self.positions = self.nll = self.nll_base = self.kld = self.top1 = 0.0
    self.logical = self.live = self.bits = self.evicted = 0.0
    self.kept: torch.Tensor | None = None

  def add_logits(self, hidden: torch.Tensor, base: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor) -> None:
    """Scores predictions of tokens[1:] from hidden states [T,hidden]."""
    for start in range(0, len(tokens) - 1, CHUNK):
      end = min(start + CHUNK, len(tokens) - 1)
      target = tokens[start + 1:end + 1, None]
      log_b = F.log_softmax(F.linear(base[start:end], head).float(), -1)
      log_s = F.log_softmax(F.linear(hidden[start:end], head).float(), -1)
      self.nll_base -= log_b.gather(1, target).sum().item()
      self.nll -= log_s.gather(1, target).sum().item()
      self.kld += (log_b.exp() * (log_b - log_s)).sum(-1).double().sum().item()
      self.top1 += (log_b.argmax(-1) == log_s.argmax(-1)).sum().item()
      self.positions += end - start

  def add_decisions(self, logits: torch.Tensor, window: int) -> None:
    layers, _, groups, length = logits.shape
    self.live += live_tokens(logits, window).sum().item()
    self.logical += layers * groups * length
    evict = logits[:, 0, :, 1:] > 0
    self.evicted += evict.sum().item()
    self.bits += evict.numel()
    kept = (~evict).sum(-1).cpu() + 1
    self.kept = kept if self.kept is None else self.kept + kept

  def report(self) -> dict:
    n = self.positions
    out = {"ppl": math.exp(self.nll / n), "ppl_base": math.exp(self.nll_base / n),
           "ppl_change_percent": 100 * (math.exp((self.nll - self.nll_base) / n) - 1), "kld": self.kld / n,
           "top1": self.top1 / n, "positions": int(n)}
    if self.logical:
      out |= {"live_ratio": self.logical / self.live, "evict_rate": self.evicted / self.bits}
    return {k: round(v, 6) for k, v in out.items()}


@torch.no_grad()
def evaluate(base: Model, student: Model | None, windows: torch.Tensor, modes: dict[str, Gate | None],
             cache: dict[str, torch.dtype | None]) -> dict[str, Totals]:
  """Runs every mode over windows [K,N]. A mode without a gate is the base again (with its own cache type)."""
  totals = {mode: Totals() for mode in modes}
  for i, window in enumerate(windows):
    started = time.monotonic()
    base.set_cache_dtype(torch.bfloat16)
    reference, _ = base(window[None])
    for mode, gate in modes.items():
      model = base if gate is None else student
      model.set_cache_dtype(cache[mode])
      hidden, logits = model(window[None], gate)
      totals[mode].add_logits(hidden[0], reference[0], base.head, window)
      if logits is not None:
        totals[mode].add_decisions(logits, gate.window)
    print(f"  window {i + 1} of {len(windows)}: {time.monotonic() - started:.1f} s", flush=True)
  return totals


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", type=Path, required=True)
  parser.add_argument("--adapter", type=Path, required=True)
  parser.add_argument("--text", type=Path, nargs="+", required=True)
  parser.add_argument("--context", type=int, default=8192)
  parser.add_argument("--windows", type=int, default=6)
  parser.add_argument("--skip", type=int, default=0, help="tokens left out at the start of the text")
  parser.add_argument("--threshold", type=float, nargs="*", default=[0.0],
                      help="decision thresholds beside the adapter's offset: evict iff logit > threshold (higher keeps more)")
  parser.add_argument("--noise", action="store_true", help="also the base with a float32 cache, against the BF16 one")
  parser.add_argument("--update-alone", action="store_true", help="also the trained update without eviction")
  parser.add_argument("--dtype", choices=DTYPES, default="float32")
  parser.add_argument("--json", type=Path)
  parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
  args = parser.parse_args()

  device, dtype = torch.device(args.device), DTYPES[args.dtype]
  source = model_directory(args.model)
  base = Model.load(source, device, dtype)
  student, metadata = load_student(source, args.adapter, device, dtype)

  tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
  results = []
  for text in args.text:
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False).ids[args.skip:]
    count = min(args.windows, len(ids) // args.context)
    if count == 0:
      raise SystemExit(f"{text}: {len(ids)} tokens; {args.context} are needed")
    windows = torch.tensor(ids[:count * args.context], device=device).view(count, args.context)
    print(f"{text.name}: {count} windows of {args.context}", flush=True)

    window = metadata["dms_window_size"]
    modes: dict[str, Gate | None] = {"dense-f32cache": None} if args.noise else {}
    shift = LOGIT_OFFSET - metadata["dms_initial_alpha_offset"]
    compiled = device.type == "cuda" and args.context % BLOCK == 0
    modes |= {f"dms@{t:+g}": Gate(window, shift=shift - t, compiled=compiled) for t in args.threshold}
    if args.update_alone:
      modes["update-alone"] = Gate(window, dense=True)
    cache = {m: None if m == "dense-f32cache" else torch.bfloat16 for m in modes}
    totals = evaluate(base, student, windows, modes, cache)
    result = {"text": text.name, "context": args.context, "windows": count, "dtype": args.dtype,
              "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "window": window,
              "offset": metadata["dms_initial_alpha_offset"], "modes": {m: t.report() for m, t in totals.items()}}
    kept = totals[f"dms@{args.threshold[0]:+g}"].kept
    result["kept_share"] = [[round(x, 4) for x in row] for row in (kept.double() / (count * args.context)).tolist()]
    for mode, figures in result["modes"].items():
      print(f"{mode:16} live {figures.get('live_ratio', 1.0):6.3f}x  ppl {figures['ppl']:.3f} "
            f"({figures['ppl_change_percent']:+.2f} %)  kld {figures['kld']:.5f}  top1 {figures['top1']:.4f}", flush=True)
    results.append(result)
  if args.json:
    args.json.write_text(json.dumps(results if len(results) > 1 else results[0], indent=1) + "\n")


if __name__ == "__main__":
  main()
