"""Holds an engine's dump against a forward of its own: `python -m winnow_training.compare_engine --model M --dump F`.

The dump is what `winnow eval --dump F` writes of one window: "tokens" [N], "decisions" [layers, N, KV heads] (a token's
own bit, 1: evict; absent in dense modes), "logits" [R, vocab] of the last R tokens. The forward here is the plain one:
float32, a T x T mask a head, K and V rounded to BF16 as the cache stores them, the engine's bits forced. So each
decision is judged on the very history that the engine had, and

* a bit may differ only where the decision logit is nearer to the threshold than rounding reaches, and in at most
  0.5 % of all;
* the logits must agree as far as rounding lets them.

How far that is, is measured, not guessed: the same forward in float64 differs from the float32 one by rounding alone
(BF16 ties of K and V included). Two float32 programs may each be that far from it, on their own tokens; the bounds are
`MARGIN` times the largest difference seen, and for the logits' root mean square `MARGIN_RMS` times its own.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

from winnow_training.adapter import load_student
from winnow_training.model import Model, model_directory, rope_table

MARGIN, MARGIN_RMS = 4.0, 2.0
MOST_DIFFERING = 0.005


@dataclass
class Dump:
  tokens: torch.Tensor                # [N] int64
  decisions: torch.Tensor | None      # [layers, N, KV heads] bool
  logits: torch.Tensor                # [R, vocab] float32
  metadata: dict[str, str]


def read_dump(path: Path) -> Dump:
  with safe_open(path, "pt") as f:
    names = set(f.keys())
    if missing := {"tokens", "logits"} - names:
      raise ValueError(f"{path}: no tensor {sorted(missing)}")
    decisions = f.get_tensor("decisions").bool() if "decisions" in names else None
    return Dump(f.get_tensor("tokens").long(), decisions, f.get_tensor("logits").float(), f.metadata() or {})


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
  return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def _stored(x: torch.Tensor) -> torch.Tensor:
  return x.to(torch.bfloat16).to(x.dtype)


@torch.no_grad()
def reference(model: Model, dump: Dump, window: int, limit: float, dtype: torch.dtype
              ) -> tuple[torch.Tensor, torch.Tensor]:
  """Distances of the decision logits from their threshold [layers, N, KV heads] (positive: evict) and the logits of
  the dump's last tokens, in `dtype`. `limit`: offset plus threshold, on the scale of the logits times 100."""
  c, length = model.config, len(dump.tokens)
  group = c.heads // c.kv_heads
  position = torch.arange(length)
  distance = position[:, None] - position
  cos, sin = (t.to(dtype) for t in rope_table(c, length, torch.device("cpu")))
  turn = lambda x: x * cos + torch.cat([-x[..., c.head_dim // 2:], x[..., :c.head_dim // 2]], -1) * sin
  margins, h = [], model.embed[dump.tokens].to(dtype)
  for i, layer in enumerate(model.layers):
    weight = lambda name: getattr(layer, name).to(dtype)
    x = _norm(h, layer.input_layernorm, c.eps)
    heads = lambda name: (x @ weight(name).T).view(length, -1, c.head_dim).transpose(0, 1)
    q, k, v = heads("q_proj"), heads("k_proj"), heads("v_proj")
    if c.qk_norm:
      q, k = _norm(q, layer.q_norm, c.eps), _norm(k, layer.k_norm, c.eps)
    if layer.borrowed:
      value = q[::group, :, -1].T.to(torch.bfloat16).to(dtype)
      keep = torch.ones(c.heads, 1, c.head_dim, dtype=dtype)
      keep[::group, :, -1] = 0
      q = turn(q * keep) * keep
    else:
      value = _norm(h, layer.dms_norm, c.eps) @ layer.dms_proj.to(dtype).T
      q = turn(q)
    margins.append(value * 100.0 - limit)
    k, v = _stored(turn(k)), _stored(v)
    out = torch.empty(c.heads, length, c.head_dim, dtype=dtype)
    for g in range(c.kv_heads):
      hidden = distance < 0
      if dump.decisions is not None:
        evicted = F.pad(dump.decisions[i, 1:, g], (0, 1))     # The next token's bit decides; the newest stays.
        hidden = hidden | ((distance > window) & evicted)
      for head in range(g * group, (g + 1) * group):
        scores = (q[head] @ k[g].T).mul_(c.head_dim ** -0.5).masked_fill_(hidden, float("-inf"))
        out[head] = scores.softmax(-1) @ v[g]
    h = h + out.transpose(0, 1).reshape(length, -1) @ weight("o_proj").T
    x = _norm(h, layer.post_attention_layernorm, c.eps)
    h = h + (F.silu(x @ weight("gate_proj").T) * (x @ weight("up_proj").T)) @ weight("down_proj").T
  last = _norm(h[-len(dump.logits):], model.norm, c.eps)
  return torch.stack(margins), last @ model.head.to(dtype).T


def compare(model: Model, dump: Dump, window: int, limit: float) -> dict:
  """Figures and the verdict `agrees`."""
  margins, logits = reference(model, dump, window, limit, torch.float32)
  exact_margins, exact_logits = reference(model, dump, window, limit, torch.float64)
  rms = lambda x: x.square().mean().sqrt().item()
  noise, noise_rms = (logits - exact_logits).abs().max().item(), rms(logits - exact_logits)
  logit_error, error_rms = (dump.logits - exact_logits).abs().max().item(), rms(dump.logits - exact_logits)
  report = {"tokens": len(dump.tokens), "scored_rows": len(dump.logits), "logit_noise": noise,
            "logit_bound": MARGIN * noise, "logit_error": logit_error,
            "logit_rms_bound": MARGIN_RMS * noise_rms, "logit_rms_error": error_rms, "logit_rms": rms(exact_logits),
            "top1_equal": (dump.logits.argmax(-1) == exact_logits.argmax(-1)).double().mean().item()}
  agrees = logit_error <= MARGIN * noise and error_rms <= MARGIN_RMS * noise_rms
  if dump.decisions is not None:
    noise = (margins - exact_margins).abs().max().item()
    differ = (exact_margins > 0) != dump.decisions
    nearest = exact_margins[differ].abs().max().item() if differ.any() else 0.0
    share = differ.double().mean().item()
    report |= {"decisions": differ.numel(), "differ": int(differ.sum()), "differ_share": share,
               "evicted": dump.decisions.double().mean().item(), "decision_noise": noise,
               "decision_bound": MARGIN * noise, "largest_differing": nearest}
    agrees = agrees and nearest <= MARGIN * noise and share <= MOST_DIFFERING
  return report | {"agrees": agrees}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", type=Path, required=True)
  parser.add_argument("--adapter", type=Path, help="folder of the adapter or checkpoint; none for a dense dump")
  parser.add_argument("--dump", type=Path, required=True)
  parser.add_argument("--json", type=Path)
  args = parser.parse_args()
  source, dump = model_directory(args.model), read_dump(args.dump)
  if dump.metadata.get("mode", "dms-bf16") not in ("dms-bf16", "dense-bf16"):
    raise SystemExit(f"{args.dump}: mode {dump.metadata['mode']}; only a BF16 cache is compared")
  if (args.adapter is None) != (dump.decisions is None):
    raise SystemExit(f"{args.dump}: {'no ' if dump.decisions is None else ''}decisions in it; --adapter does not fit")
  cpu, window, limit = torch.device("cpu"), 0, 0.0
  if args.adapter is None:
    model = Model.load(source, cpu, torch.float32)
  else:
    model, metadata = load_student(source, args.adapter, cpu, torch.float32)
    for name, default in (("dms_window_size", None), ("dms_decision_shift", 1), ("dms_alpha_scale", 100.0),
                          ("dms_initial_alpha_offset", None)):
      ours, theirs = metadata.get(name, default), dump.metadata.get(name)
      if theirs is not None and float(theirs) != float(ours):
        raise SystemExit(f"{args.dump}: {name} is {theirs} there and {ours} in {args.adapter}")
    window = metadata["dms_window_size"]
    limit = metadata["dms_initial_alpha_offset"] + float(dump.metadata.get("dms_threshold", 0.0))
  report = compare(model, dump, window, limit)
  print(json.dumps(report, indent=1))
  if args.json:
    args.json.write_text(json.dumps(report, indent=1) + "\n")
  return 0 if report["agrees"] else 1


if __name__ == "__main__":
  sys.exit(main())
