"""What a model still finds in a long prompt once its cache is winnowed.

`python -m winnow_training.needles --model DIR --adapter DIR --tasks FILE.jsonl --json OUT`. A task is a line
{"id": str, "kind": "single" | "multi" | "facts", "context": int, "depth": float, "prompt_ids": [int],
"answers": [str], "max_new_tokens": int}; it counts as found when every answer occurs in the greedy continuation. Base
and adapter run the same float32 arithmetic on BF16 weights with a BF16 cache: one prefill, then cached decoding, hard
decisions. Reported for each context: found by the base, by the adapter, by both, and of those the base finds the share
that the adapter finds, with its 95 % Wilson interval.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from winnow_training import attention
from winnow_training.adapter import load_student
from winnow_training.evaluate import DTYPES
from winnow_training.gate import LOGIT_OFFSET, hard_bias
from winnow_training.model import Layer, Model, model_directory, rms_norm, rope_table, rotate

KINDS = ("single", "multi", "facts")


@dataclass
class Task:
  id: str
  kind: str
  context: int
  depth: float
  prompt_ids: list[int]
  answers: list[str]
  max_new_tokens: int
  texts: dict[str, str] = field(default_factory=dict)   # what each model wrote

  def found(self, model: str) -> bool:
    # As `winnow niah`: the case of letters does not count.
    text = self.texts[model].lower()
    return all(answer.lower() in text for answer in self.answers)


def read_tasks(path: Path, vocabulary: int) -> list[Task]:
  """Tasks of a file, one a line. ValueError, naming the line, for what is not one."""
  tasks = []
  for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
    if not line.strip():
      continue
    try:
      task = Task(**{k: v for k, v in json.loads(line).items() if k in Task.__dataclass_fields__ and k != "texts"})
    except (TypeError, json.JSONDecodeError) as error:
      raise ValueError(f"{path}:{number}: {error}") from None
    if not task.prompt_ids or not all(0 <= t < vocabulary for t in task.prompt_ids):
      raise ValueError(f"{path}:{number}: prompt_ids must be tokens of the model")
    if not task.answers or task.max_new_tokens < 1 or task.kind not in KINDS:
      raise ValueError(f"{path}:{number}: needs answers, max_new_tokens >= 1 and a kind of {', '.join(KINDS)}")
    tasks.append(task)
  if not tasks:
    raise ValueError(f"{path}: no tasks")
  return tasks


class Decoder:
  """Greedy decoding of a batch of prompts of unequal length. Not thread-safe.

  Rows are padded at the end; row b's next token goes to slot length_b. `window` None: dense.
  """

  def __init__(self, model: Model, window: int | None, shift: float, cache: torch.dtype | None):
    self._model, self._window, self._shift, self._cache = model, window, shift, cache

  def _qkv(self, layer: Layer, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    c = layer.config
    x = rms_norm(h, layer.input_layernorm, c.eps)
    heads = lambda weight, n: F.linear(x, weight).view(*x.shape[:2], n, c.head_dim).transpose(1, 2)
    q, k, v = heads(layer.q_proj, c.heads), heads(layer.k_proj, c.kv_heads), heads(layer.v_proj, c.kv_heads)
    if c.qk_norm:
      q, k = rms_norm(q, layer.q_norm, c.eps), rms_norm(k, layer.k_norm, c.eps)
    stored = lambda t: t if self._cache is None else t.to(self._cache).to(t.dtype)
    return [rotate(q, cos, sin), stored(rotate(k, cos, sin)), stored(v)]

  def _rest(self, layer: Layer, h: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The layer after attention; a [B,heads,T,d]."""
    h = h + F.linear(a.transpose(1, 2).flatten(2), layer.o_proj)
    x = rms_norm(h, layer.post_attention_layernorm, layer.config.eps)
    return h + F.linear(F.silu(F.linear(x, layer.gate_proj)) * F.linear(x, layer.up_proj), layer.down_proj)

  @torch.no_grad()
  def generate(self, prompts: list[list[int]], new_tokens: int, stops: list[int], room: int = 0) -> list[list[int]]:
    """Up to `new_tokens` tokens for each prompt, without the stop token that ended it. Prompts are padded to `room`
    at least: batches of one shape share a compiled kernel."""
    model, device = self._model, self._model.embed.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = -(-max(room, int(lengths.max())) // attention.BLOCK) * attention.BLOCK   # Whole blocks for the compact kernel.
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
      tokens[row, :len(prompt)] = torch.tensor(prompt)
    total = longest + new_tokens
    cos, sin = rope_table(model.config, total, device)
    state, h = [], F.embedding(tokens.to(device), model.embed)
    for layer in model.layers:
      q, k, v = self._qkv(layer, h, cos[:longest], sin[:longest])
      evicted = torch.zeros(len(prompts), model.config.kv_heads, total, dtype=torch.bool, device=device)
      if self._window is None:
        a = attention.causal(q, k, v)
      else:
        logits = layer.decide(h) + self._shift
        bias = hard_bias(logits)
        evicted[..., :longest] = bias < 0
        # The last token's successor is padding here; its bit comes with the first new token.
        evicted.scatter_(2, (lengths - 1)[:, None, None].expand(-1, evicted.shape[1], 1), False)
        near = device.type == "cuda"
        a = attention.compact_compiled(q, k, v, bias, self._window) if near else \
            attention.masked(q, k, v, bias, self._window)
      pad = lambda t: F.pad(t, (0, 0, 0, new_tokens))
      state.append((pad(k), pad(v), evicted))
      h = self._rest(layer, h, a)
    h = h[torch.arange(len(prompts), device=device), lengths - 1][:, None]

    written = torch.zeros(len(prompts), 0, dtype=torch.int64, device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for step in range(new_tokens):
      logits = F.linear(rms_norm(h, model.norm, model.config.eps), model.head)[:, 0].float()
      token = logits.argmax(-1)
      written = torch.cat([written, token[:, None]], 1)
      running &= ~torch.isin(token, torch.tensor(stops, device=device))
      if step + 1 == new_tokens or not running.any():
        break
      h = self._step(token, lengths + step, state, cos, sin)
    rows = []
    for row in written.tolist():
      end = next((i for i, t in enumerate(row) if t in stops), len(row))
      rows.append(row[:end])
    return rows

  def _step(self, token: torch.Tensor, position: torch.Tensor, state: list[tuple], cos: torch.Tensor,
            sin: torch.Tensor) -> torch.Tensor:
    """Feeds one token a row, at slot `position` [B]; returns the last hidden state [B,1,hidden]."""
    model = self._model
    c, rows = model.config, torch.arange(len(token), device=token.device)
    slots = torch.arange(state[0][0].shape[2], device=token.device)
    distance = position[:, None] - slots
    h = F.embedding(token[:, None], model.embed)
    for layer, (keys, values, evicted) in zip(model.layers, state):
      q, k, v = self._qkv(layer, h, cos[position][:, None, None], sin[position][:, None, None])
      keys[rows, :, position], values[rows, :, position] = k[:, :, 0], v[:, :, 0]
      visible = (distance >= 0)[:, None].expand(-1, c.kv_heads, -1)
      if self._window is not None:
        evicted[rows, :, position - 1] = layer.decide(h)[..., 0] + self._shift > 0
        visible = visible & ((distance <= self._window)[:, None] | ~evicted)
      group = c.heads // c.kv_heads
      q = q.view(len(token), c.kv_heads, group, c.head_dim)
      scores = (q @ keys.transpose(2, 3)).float() * c.head_dim ** -0.5
      weights = scores.masked_fill(~visible[:, :, None], float("-inf")).softmax(-1)
      a = (weights.to(values.dtype) @ values).view(len(token), c.heads, 1, c.head_dim)
      h = self._rest(layer, h, a)
    return h


def wilson(found: int, of: int, z: float = 1.959964) -> tuple[float, float]:
  """95 % interval of a share."""
  if of == 0:
    return 0.0, 1.0
  p, d = found / of, 1 + z * z / of
  middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
  return max(0.0, (middle - half) / d), min(1.0, (middle + half) / d)


def summarize(tasks: list[Task], models: list[str]) -> dict:
  """`models` begins with the base."""
  out = {"tasks": len(tasks), models[0]: sum(t.found(models[0]) for t in tasks)}
  for model in models[1:]:
    both = sum(t.found(models[0]) and t.found(model) for t in tasks)
    low, high = wilson(both, out[models[0]])
    out[model] = {"found": sum(t.found(model) for t in tasks), "both": both,
                  "of_base": round(both / max(out[models[0]], 1), 4), "wilson95": [round(low, 4), round(high, 4)]}
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", type=Path, required=True)
  parser.add_argument("--adapter", type=Path, nargs="+", required=True)
  parser.add_argument("--tasks", type=Path, required=True)
  parser.add_argument("--threshold", type=float, default=0.0, help="beside the adapter's offset; higher keeps more")
  parser.add_argument("--batch-tokens", type=int, default=131072, help="prompt tokens in one batch")
  parser.add_argument("--dtype", choices=DTYPES, default="float32")
  parser.add_argument("--json", type=Path)
  parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
  args = parser.parse_args()

  device, dtype = torch.device(args.device), DTYPES[args.dtype]
  source = model_directory(args.model)
  tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
  base = Model.load(source, device, dtype)
  tasks = read_tasks(args.tasks, base.config.vocab)
  decoders = {"base": Decoder(base, None, 0.0, torch.bfloat16)}
  for path in args.adapter:
    student, metadata = load_student(source, path, device, dtype)
    shift = LOGIT_OFFSET - metadata["dms_initial_alpha_offset"] - args.threshold
    decoders[path.name] = Decoder(student, metadata["dms_window_size"], shift, torch.bfloat16)
  stops = [t for t in map(tokenizer.token_to_id, ("<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>")) if t is not None]

  started = time.monotonic()
  for context in sorted({t.context for t in tasks}):
    group = sorted((t for t in tasks if t.context == context), key=lambda t: len(t.prompt_ids))
    longest = max(len(t.prompt_ids) for t in group)
    size = max(1, min(len(group), args.batch_tokens // longest))
    for start in range(0, len(group), size):
      batch = group[start:start + size]
      for name, decoder in decoders.items():
        filled = batch + batch[:1] * (size - len(batch))    # One shape a context: one compilation.
        rows = decoder.generate([t.prompt_ids for t in filled], max(t.max_new_tokens for t in batch), stops, longest)
        for task, row in zip(batch, rows):
          task.texts[name] = tokenizer.decode(row[:task.max_new_tokens])
    figures = summarize(group, list(decoders))
    print(f"{context:6} tokens, {len(group)} tasks: {json.dumps(figures)}  ({time.monotonic() - started:.0f} s)", flush=True)
  models = list(decoders)
  report = {"tasks": args.tasks.name, "threshold": args.threshold, "dtype": args.dtype, "contexts": {}}
  for context in sorted({t.context for t in tasks}):
    group = [t for t in tasks if t.context == context]
    kinds = sorted({t.kind for t in group})
    report["contexts"][context] = summarize(group, models) | {
        "kinds": {k: summarize([t for t in group if t.kind == k], models) for k in kinds}}
  report["answers"] = [{"id": t.id, "context": t.context, "depth": t.depth, "answers": t.answers,
                        **{m: t.texts[m] for m in models}} for t in tasks]
  if args.json:
    args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
  main()
