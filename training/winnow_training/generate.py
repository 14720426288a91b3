"""Lets the teacher write text: `python -m winnow_training.generate --model DIR --prompts FILE --out FILE.bin.xz ...`.

Kinds of prompt (`--kinds`), filled with words and sentences of `--prompts` (plain text or a token file): a chat request
in the model's template, the heading of an encyclopedia's article, and the start of a passage to go on with. All
sequences of a batch advance together; prompts are forced token by token, so they may differ in length.
"""

import argparse
import random
import re
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from winnow_training.data import read_tokens, write_tokens
from winnow_training.model import Model, rms_norm, rope_table

BUCKET = 256  # Attention reads the cache up to a multiple of this.
LOOPING = 0.35  # A text whose tokens zlib packs below this share repeats itself, and is dropped.
KINDS = ["chat", "article", "passage"]

_REQUESTS = (
    "Write a long and detailed article about {a}.", "Explain {a} to a beginner, step by step.",
    "Tell me a story about {a} and {b}.", "What is the difference between {a} and {b}?",
    "Write an essay on the history of {a}.", "Summarize the following passage:\n\n{s}",
    "Rewrite this in your own words:\n\n{s}", "List ten facts about {a}, each with an explanation.",
    "Write a dialogue between two experts on {a}.", "Write a Python program about {a} and explain it.",
    "Answer in detail: why does {a} matter for {b}?", "Continue this text:\n\n{s}")


_TITLES = (
    "Battle of {A}", "Siege of {A}", "{A} River", "{A} ( ship )", "SS {A}", "{A} County", "{A} {B} ( footballer )",
    "{A} {B}", "{y} {A} season", "{A} Cathedral", "The {A} ( film )", "{A} ( album )", "Hurricane {A} ( {y} )",
    "{A} Railway", "{A} ( genus )", "{A} II of {B}", "{A} Island", "{A} ( song )", "{A} ( video game )", "{A} Bridge",
    "History of {A}", "{A} National Park", "{A} ( TV series )", "No. {n} Squadron", "{A} ( mineral )", "Mount {A}",
    "{A} ( bird )", "{A} Treaty", "Interstate {n}", "{A} v. {B}", "{A} ( novel )", "University of {A}", "{A} ( god )")
_LEADS = (" = {t} = \n \n {t} was ", " = {t} = \n \n The {t} ( ", " = {t} = \n \n {t} is ", "{t}\n\n{t} is ",
          "# {t}\n\n{t} was ", "{t}\n\nFrom an encyclopedia. {t} ", " = {t} = \n \n In {y} , ", "{t} was born in ")


def _heading(rng: random.Random, passage: str) -> str:
  """Title and first words of a made-up article."""
  names = re.findall(r"\b[A-Z][a-z]{3,}", passage) or ["Northwick", "Alden"]
  facts = {"A": rng.choice(names), "B": rng.choice(names), "y": rng.randrange(1400, 2016), "n": rng.randrange(2, 900)}
  return rng.choice(_LEADS).format(t=rng.choice(_TITLES).format(**facts), **facts)


def make_prompt(rng: random.Random, tokenizer: Tokenizer, text: np.ndarray, kinds: list[str]) -> list[int]:
  """Tokens of one prompt of a random kind, built around a random place in `text`."""
  start = rng.randrange(text.size - 200)
  passage = tokenizer.decode(text[start:start + 160].tolist())
  words = [w for w in re.findall(r"[A-Za-z]{5,}", passage)] or ["nature"]
  a, b = rng.choice(words), rng.choice(words)
  sentence = " ".join(passage.split()[1:rng.randrange(12, 40)])
  kind = rng.choice(kinds)
  if kind == "chat":
    request = rng.choice(_REQUESTS).format(a=a, b=b, s=sentence)
    prompt = f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"
  elif kind == "article":
    prompt = _heading(rng, passage)
  else:
    prompt = sentence
  return tokenizer.encode(prompt, add_special_tokens=False).ids[:120]


def loops(document: list[int]) -> bool:
  """Whether a small model fell into repeating itself."""
  data = np.asarray(document, dtype="<u2").tobytes()
  return len(zlib.compress(data)) < LOOPING * len(data)


class Decoder:
  """Batched sampling with a static cache; one CUDA graph for each cache length bucket."""

  def __init__(self, model: Model, batch: int, length: int):
    c = self.config = model.config
    self.model, self.batch, self.length = model, batch, length
    device = model.embed.device
    shape = (c.layers, 2, batch, c.kv_heads, length, c.head_dim)
    self._cache = torch.zeros(shape, device=device, dtype=model.embed.dtype)
    self._cos, self._sin = rope_table(c, length, device)
    self._slots = torch.arange(length, device=device)
    self._position = torch.zeros(1, dtype=torch.int64, device=device)
    self._token = torch.zeros(batch, dtype=torch.int64, device=device)
    self._next = torch.zeros(batch, dtype=torch.int64, device=device)
    self._temperature = torch.ones(batch, 1, device=device)
    self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

  def _rotate(self, x: torch.Tensor) -> torch.Tensor:
    cos, sin = self._cos[self._position], self._sin[self._position]
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

  def _step(self, extent: int) -> None:
    """One token for every sequence; attention over the first `extent` slots."""
    c, m = self.config, self.model
    group = c.heads // c.kv_heads
    hidden_slots = (self._slots[:extent] > self._position)
    h = F.embedding(self._token, m.embed)
    for i, layer in enumerate(m.layers):
      x = rms_norm(h, layer.input_layernorm, c.eps)
      q = F.linear(x, layer.q_proj).view(self.batch, c.heads, c.head_dim)
      k = F.linear(x, layer.k_proj).view(self.batch, c.kv_heads, c.head_dim)
      v = F.linear(x, layer.v_proj).view(self.batch, c.kv_heads, c.head_dim)
      if c.qk_norm:
        q, k = rms_norm(q, layer.q_norm, c.eps), rms_norm(k, layer.k_norm, c.eps)
      keys, values = self._cache[i]
      keys.index_copy_(2, self._position, self._rotate(k)[:, :, None])
      values.index_copy_(2, self._position, v[:, :, None])
      q = self._rotate(q).view(self.batch, c.kv_heads, group, c.head_dim) * c.head_dim ** -0.5
      scores = q @ keys[:, :, :extent].transpose(2, 3)
      weights = scores.float().masked_fill(hidden_slots, float("-inf")).softmax(-1).to(v.dtype)
      a = (weights @ values[:, :, :extent]).reshape(self.batch, c.heads * c.head_dim)
      h = h + F.linear(a, layer.o_proj)
      x = rms_norm(h, layer.post_attention_layernorm, c.eps)
      h = h + F.linear(F.silu(F.linear(x, layer.gate_proj)) * F.linear(x, layer.up_proj), layer.down_proj)
    logits = F.linear(rms_norm(h, m.norm, c.eps), m.head).float()
    race = torch.empty_like(logits).exponential_()
    self._next.copy_(((logits / self._temperature) - race.log()).argmax(-1))

  def _run(self, extent: int) -> None:
    if not self._token.is_cuda:
      self._step(extent)
      return
    if extent not in self._graphs:
      side = torch.cuda.Stream()
      with torch.cuda.stream(side):
        self._step(extent)
      torch.cuda.current_stream().wait_stream(side)
      self._graphs[extent] = torch.cuda.CUDAGraph()
      with torch.cuda.graph(self._graphs[extent]):
        self._step(extent)
    self._graphs[extent].replay()

  @torch.no_grad()
  def sample(self, prompts: list[list[int]], temperatures: list[float]) -> torch.Tensor:
    """Continues `batch` prompts to `length` tokens each; returns them all, [batch, length], on the CPU."""
    device = self._token.device
    forced = torch.full((self.batch, self.length), -1, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
      forced[row, :len(prompt)] = torch.tensor(prompt)
    forced = forced.to(device)
    out = torch.empty_like(forced)
    self._temperature.copy_(torch.tensor(temperatures)[:, None])
    for t in range(self.length):
      self._token.copy_(torch.where(forced[:, t] >= 0, forced[:, t], self._next))
      out[:, t] = self._token
      self._position.fill_(t)
      self._run(min(-(-(t + 1) // BUCKET) * BUCKET, self.length))
    return out.cpu()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", type=Path, required=True)
  parser.add_argument("--prompts", type=Path, required=True)
  parser.add_argument("--out", type=Path, required=True, help="token file; what it holds is replaced")
  parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="one is drawn for each text")
  parser.add_argument("--batch", type=int, default=1024)
  parser.add_argument("--length", type=int, default=1536)
  parser.add_argument("--rounds", type=int, default=2)
  parser.add_argument("--seed", type=int, default=1)
  parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
  args = parser.parse_args()

  torch.manual_seed(args.seed)
  model = Model.load(args.model, torch.device(args.device), torch.bfloat16)
  tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
  text = read_tokens(args.prompts, tokenizer)
  rng = random.Random(args.seed)
  end = tokenizer.token_to_id("<|endoftext|>")
  decoder = Decoder(model, args.batch, args.length)
  documents, started = [], time.monotonic()
  for i in range(args.rounds):
    prompts = [make_prompt(rng, tokenizer, text, args.kinds) for _ in range(args.batch)]
    written = decoder.sample(prompts, [rng.uniform(0.8, 1.0) for _ in prompts]).tolist()
    documents += [d for d in written if not loops(d)]
    total = sum(map(len, documents))
    print(f"round {i + 1} of {args.rounds}: {total:,} tokens kept, {total / (time.monotonic() - started):,.0f} a second",
          flush=True)
  write_tokens(args.out, documents, end)


if __name__ == "__main__":
  main()
