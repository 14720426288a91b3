"""Token files, and the stream of training sequences drawn from them.

A token file is a run of little-endian uint16 token ids (uint32 when the name ends in `.bin32`), documents divided by
the separator token. A `.txt` file or a folder of them is tokenized on first use.
"""

import lzma
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer


def write_tokens(path: Path, documents: list[list[int]], separator: int | None) -> None:
  """Writes `documents` as one token file; `.xz` at the end of the name compresses it."""
  parts = [np.asarray(d + ([separator] if separator is not None else []), dtype=np.uint32) for d in documents]
  tokens = np.concatenate(parts) if parts else np.zeros(0, np.uint32)
  name = path.name.removesuffix(".xz")
  if not name.endswith(".bin32"):
    if tokens.size and tokens.max() > 0xFFFF:
      raise ValueError(f"{path}: token {tokens.max()} does not fit 16 bits; name the file .bin32")
    tokens = tokens.astype("<u2")
  data = tokens.tobytes()
  path.write_bytes(lzma.compress(data, preset=6) if path.name.endswith(".xz") else data)


def read_tokens(path: Path, tokenizer: Tokenizer) -> np.ndarray:
  """All tokens of a token file, a text file, or every text file below a folder (in name order)."""
  if path.is_dir():
    return np.concatenate([read_tokens(p, tokenizer) for p in sorted(path.rglob("*.txt"))])
  name = path.name.removesuffix(".xz")
  if name.endswith((".bin", ".bin32")):
    data = path.read_bytes()
    data = lzma.decompress(data) if path.name.endswith(".xz") else data
    return np.frombuffer(data, dtype="<u4" if name.endswith(".bin32") else "<u2")
  ids = tokenizer.encode(path.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False).ids
  return np.asarray(ids, dtype=np.uint32)


@dataclass
class Source:
  tokens: np.ndarray
  weight: float


_NAMES = ("Alden Birch Corin Delia Edda Faron Gwen Hollis Imre Jora Kestrel Lumen Maren Nadir Orla Petra Quill Rowan "
          "Sable Tamsin Ulric Vesna Wren Xanthe Yarrow Zephyr").split()
_THINGS = ("vault archive harbour gate observatory library locker console relay station lighthouse workshop garden "
           "ledger shipment account server cabinet telescope reactor").split()
_PLACES = ("Arlen Bexley Corvane Dunmore Eastmere Fallow Greystone Highfell Ironbridge Juniper Kelso Larkhill Marrow "
           "Northwick Oakhurst Pinecrest Quarry Ravenna Stonebeck Thornby Umbria Valewood Westmarch").split()
_TRADES = "baker chemist clerk diver farmer glazier herald mason miller painter pilot potter sailor smith tailor".split()


def _fact(rng: random.Random) -> tuple[str, str, str]:
  """A made-up fact: (sentence that states it, question, answer)."""
  place, name, thing = rng.choice(_PLACES), rng.choice(_NAMES), rng.choice(_THINGS)
  number = str(rng.randrange(10 ** rng.randrange(3, 7), 10 ** 7))[:rng.randrange(4, 8)]
  match rng.randrange(9):
    case 0:
      return (f"The secret code of the {thing} in {place} is {number}.",
              f"What is the secret code of the {thing} in {place}?", number)
    case 1:
      return (f"{name}'s special number for the {thing} is {number}.",
              f"What is {name}'s special number for the {thing}?", number)
    case 2:
      capital = rng.choice(_PLACES)
      return (f"The capital of {place}ia is {capital}.", f"What is the capital of {place}ia?", capital)
    case 3:
      trade = rng.choice(_TRADES)
      return (f"{name} of {place} works as a {trade}.", f"What is the trade of {name} of {place}?", trade)
    case 4:
      key = "-".join("".join(rng.choices("abcdefghjkmnpqrstuvwxyz23456789", k=4)) for _ in range(2))
      return (f"Remember this: the pass phrase for the {thing} of {name} is {key}.",
              f"What is the pass phrase for the {thing} of {name}?", key)
    case 5:
      return (f"The {thing} of {place} opens with the number {number}.",
              f"With which number does the {thing} of {place} open?", number)
    case 6:
      return (f"If anybody asks, {name} can be reached in {place} under {number}.",
              f"Under which number can {name} be reached in {place}?", number)
    case 7:
      colour = rng.choice("amber azure black bronze crimson green grey indigo ivory olive purple scarlet white".split())
      return (f"The door of the {thing} in {place} is painted {colour}.",
              f"What colour is the door of the {thing} in {place}?", colour)
    case _:
      return (f"The magic number mentioned in the {place} report is {number}.",
              f"What is the magic number mentioned in the {place} report?", number)


class SequenceStream:
  """Endless training sequences of `length` tokens; sequence `i` depends on (seed, i) alone, so a run resumes exactly.

  A share `recall` of them carries one to four made-up facts planted at random depths and asked for at the end,
  often inside the model's chat template.
  """

  def __init__(self, sources: list[Source], tokenizer: Tokenizer, length: int, recall: float, seed: int):
    for source in sources:
      if source.tokens.size <= length:
        raise ValueError(f"a source holds {source.tokens.size} tokens; {length + 1} are needed")
    self._sources, self._tokenizer = sources, tokenizer
    self._length, self._recall, self._seed = length, recall, seed

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [length], int64, and which of them are predicted as (part of) an answer, [length] bool: the model's
    output at such a position is scored against the answer's next token."""
    rng = random.Random(f"{self._seed}/{index}")
    source = rng.choices(self._sources, [s.weight for s in self._sources])[0].tokens
    start = rng.randrange(source.size - self._length)
    tokens = source[start:start + self._length].astype(np.int64)
    if rng.random() < self._recall:
      return self._plant(tokens, rng)
    return tokens, np.zeros(self._length, dtype=bool)

  def _plant(self, filler: np.ndarray, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    encode = lambda text: np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
    facts = [_fact(rng) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
    chat = rng.random() < 0.6
    head = encode("<|im_start|>user\n") if chat else filler[:0]
    tail, answers = [], []
    for statement, question, answer in rng.sample(facts, len(facts)):
      before, after = f"\n\nQuestion: {question}\nAnswer:", "\n"
      if chat:
        before, after = f"\n\n{question}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n"
        if rng.random() < 0.5:    # A whole sentence, most of it the statement again.
          answer = statement
      elif rng.random() < 0.5 and statement.endswith(f"{answer}."):   # The statement's start, to be completed.
        before, answer = f"\n\n{statement[:-len(answer) - 2]}", f" {answer}"
      else:
        answer = f" {answer}"
      parts = [encode(before), encode(answer), encode(after)]
      tail += parts
      answers += [np.zeros(len(parts[0]), bool), np.ones(len(parts[1]), bool), np.zeros(len(parts[2]), bool)]
    stated = [encode(f" {statement} ") for statement, _, _ in facts]
    room = self._length - len(head) - sum(map(len, tail)) - sum(map(len, stated))
    if room < len(facts):
      return filler, np.zeros(self._length, dtype=bool)
    # Facts may stand anywhere, and the haystack may be short: then the sequence goes on with other text after it.
    used = room if rng.random() < 0.6 else rng.randrange(room // 8, room)
    cuts = sorted(rng.randrange(used) for _ in stated)
    pieces, last = [head], 0
    for cut, fact in zip(cuts, stated):
      pieces += [filler[last:cut], fact]
      last = cut
    pieces += [filler[last:used], *tail, filler[used:room]]
    start = len(head) + used + sum(map(len, stated))
    scored = np.zeros(self._length + 1, dtype=bool)
    scored[start:start + sum(map(len, tail))] = np.concatenate(answers)
    return np.concatenate(pieces), scored[1:]
