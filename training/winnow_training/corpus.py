"""Builds token files from Debian packages: `python -m winnow_training.corpus --config C --tokenizer T --out DIR`.

Downloads each package with apt-get (no root needed), unpacks it with dpkg, turns its files into plain text and
writes one file of tokens a group (`docs.bin.xz`, `prose.bin.xz`; see `data.py` for the format), plus `corpus.json` with the
versions and token counts. A group marked `text = true` becomes one plain text file a package instead: held-out text.
"""

import argparse
import bz2
import gzip
import html
import itertools
import json
import lzma
import random
import re
import subprocess
import tomllib
import zlib
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from winnow_training.data import write_tokens

_DROP = re.compile(r"<(script|style|nav|head|footer)\b.*?</\1>|<!--.*?-->", re.S | re.I)
_BLOCK = re.compile(r"</?(p|div|h[1-6]|li|ul|ol|tr|table|pre|br|dd|dt|dl|section|blockquote|title|item|note|steps)\b[^>]*>",
                    re.I)
_TAG = re.compile(r"<[^>]*>")
_CFG_STRING = re.compile(r'\b(?:message|story|description|text|note)\s*=\s*_\s*"((?:[^"]|"")*)"')
_RULESET_STRING = re.compile(r'_\("((?:[^"\\]|\\.)*)"\)', re.S)
_BACKQUOTED = re.compile(r"`([^`]*)`")
_TRANSLATED = re.compile(r"\.(?!en\b)[a-z]{2}(_[A-Z]{2})?\.html$")
_POD_CODE = re.compile(r"[A-Z]<+\s?([^<>]*)\s?>+")


def html_to_text(source: str) -> str:
  """Text of an HTML or XML page: markup dropped, one blank line between blocks."""
  text = _TAG.sub("", _BLOCK.sub("\n", _DROP.sub(" ", source)))
  return squeeze(html.unescape(text))


def squeeze(text: str) -> str:
  """Strips trailing blanks and runs of empty lines."""
  text = re.sub(r"[ \t\r\u00a0]+\n", "\n", text)
  return re.sub(r"\n{3,}", "\n\n", text).strip()


def pod_to_text(source: str) -> str:
  source = re.sub(r"^=(cut|over|back|begin|end|for|encoding)\b.*$", "", source, flags=re.M)
  source = re.sub(r"^=(head\d|item)\s*", "", source, flags=re.M)
  return squeeze(_POD_CODE.sub(r"\1", source))


def cfg_to_text(source: str) -> str:
  """The translatable prose of a Wesnoth scenario, in order."""
  strings = (s.replace('""', '"').strip() for s in _CFG_STRING.findall(source))
  return squeeze("\n\n".join(s for s in strings if len(s) > 40))


def ruleset_to_text(source: str) -> str:
  """The translatable prose of a Freeciv ruleset."""
  strings = (re.sub(r"\\\n", "", s).replace("\\n", "\n").replace('\\"', '"') for s in _RULESET_STRING.findall(source))
  return squeeze("\n\n".join(s for s in strings if len(s) > 60))


def backquoted_text(source: str) -> str:
  """The dialogue of an Endless Sky mission file, or nothing."""
  return squeeze("\n".join(s for s in _BACKQUOTED.findall(source) if len(s) > 40))


def rdb_to_text(raw: bytes) -> str:
  """The strings of an R package's data, a line each, in order.

  The file is a run of blocks: big-endian length of the plain bytes, for some a type letter, a compressed stream; in
  the plain bytes a string is 00 xx 00 09 (its kind), its length, its bytes.
  """
  lines, at = [], 0
  while at + 5 < len(raw):
    kind = raw[at + 4:at + 5]
    unpack = {b"2": bz2.BZ2Decompressor, b"Z": lzma.LZMADecompressor}.get(kind, zlib.decompressobj)()
    rest = raw[at + (5 if kind in (b"2", b"Z") else 4):]
    data = unpack.decompress(rest)
    at = len(raw) - len(unpack.unused_data)
    i = 0
    while (i := data.find(b"\x00\x09", i + 1)) > 0:
      size = int.from_bytes(data[i + 2:i + 6], "big")
      text = data[i + 6:i + 6 + size]
      if size < 4096 and len(text) == size and b"\0" not in text:
        lines.append(text.decode("utf-8", errors="replace"))
        i += 5 + size
  return squeeze("\n".join(lines))


def spaced(text: str) -> str:
  """`text` as tokenized corpora print it: blanks around punctuation, inner marks between at signs."""
  text = re.sub(r"(?<=\w)([-–])(?=\w)", r" @\1@ ", text)
  text = re.sub(r"(?<=\d)([.,])(?=\d)", r" @\1@ ", text)
  text = re.sub(r"(?<=\w)([,;:!?)\]\"]|'s\b|n't\b)", r" \1", text)
  text = re.sub(r"(?<=\w)\.(?=\s|$)", " .", text)
  return re.sub(r"([(\[])(?=\w)", r"\1 ", text)


def file_to_text(path: Path) -> str:
  """Plain text of one file, chosen by its suffix; empty when it is not text."""
  name = path.name
  raw = path.read_bytes()
  if name.endswith(".rdb"):
    return rdb_to_text(raw)
  if name.endswith((".gz", ".dz")):
    raw, name = gzip.decompress(raw), name.rsplit(".", 1)[0]
  if b"\0" in raw[:4096]:
    return ""
  try:
    text = raw.decode("utf-8")
  except UnicodeDecodeError:
    text = raw.decode("latin-1")
  if name.endswith((".html", ".htm", ".page", ".utf8")):
    return html_to_text(text)
  if name.endswith(".pod"):
    return pod_to_text(text)
  if name.endswith(".cfg"):
    return cfg_to_text(text)
  if name.endswith(".ruleset"):
    return ruleset_to_text(text)
  if "endless-sky" in path.parts:
    return backquoted_text(text)
  return squeeze(text.replace("\n%\n", "\n\n"))  # `%` lines divide fortunes.


def fetch(package: str, work: Path) -> str:
  """Downloads and unpacks `package` below `work` (once); returns its version."""
  root = work / package
  if not root.exists():
    debs = work / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-q", package], cwd=debs, check=True, capture_output=True)
    deb = max(debs.glob(f"{package}_*.deb"), key=lambda p: p.stat().st_mtime)
    subprocess.run(["dpkg", "-x", deb, root], check=True)
  deb = next((work / "debs").glob(f"{package}_*.deb"))
  return subprocess.run(["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True).stdout.strip()


def package_texts(root: Path, globs: list[str], rng: random.Random) -> Iterator[str]:
  """Documents of one package, in random order."""
  paths = sorted({p for g in globs for p in root.glob(g) if p.is_file() and not p.is_symlink() and not _TRANSLATED.search(p.name)})
  rng.shuffle(paths)
  return (text for text in map(file_to_text, paths) if len(text) >= 400)


def package_tokens(tokenizer: Tokenizer, texts: Iterator[str], cap: int, share: float,
                   rng: random.Random) -> list[list[int]]:
  """Documents as token lists, up to `cap` tokens in all; a share of them in the style of `spaced`."""
  documents, total = [], 0
  for text in texts:
    start = rng.randrange(len(text)) if len(text) > 8 * cap else 0  # One huge file: a random stretch of it.
    text = text[start:start + 8 * cap]
    # Long texts change style on the way.
    pieces = [text[i:i + 20_000] for i in range(0, len(text), 20_000)]
    text = "".join(spaced(p) if rng.random() < share else p for p in pieces)
    ids = tokenizer.encode(text, add_special_tokens=False).ids[:cap - total]
    documents.append(ids)
    total += len(ids)
    if total >= cap:
      break
  return documents


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", type=Path, required=True)
  parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of the model")
  parser.add_argument("--work", type=Path, default=Path("corpus-work"), help="packages are kept here")
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--seed", type=int, default=1)
  args = parser.parse_args()

  tokenizer = Tokenizer.from_file(str(args.tokenizer))
  separator = tokenizer.token_to_id("<|endoftext|>")
  args.out.mkdir(parents=True, exist_ok=True)
  report = {}
  for group, spec in tomllib.loads(args.config.read_text()).items():
    documents = []
    for package in spec["packages"]:
      rng = random.Random(f"{args.seed}/{package['name']}")
      version = fetch(package["name"], args.work)
      texts = package_texts(args.work / package["name"], package["files"], rng)
      if spec.get("text", False):
        text = "\n\n".join(itertools.islice(texts, spec["max_files"]))
        (args.out / f"{package['name']}.txt").write_text(text[:spec["max_characters"]])
        report[package["name"]] = {"group": group, "version": version, "characters": len(text)}
        continue
      found = package_tokens(tokenizer, texts, spec["max_tokens"], spec.get("spaced", 0.0), rng)
      if not found:
        raise SystemExit(f"{package['name']}: no text matches its globs")
      documents += found
      report[package["name"]] = {"group": group, "version": version, "tokens": sum(map(len, found))}
      print(f"{group:6} {package['name']:28} {version:24} {report[package['name']]['tokens']:9,} tokens", flush=True)
    if spec.get("text", False):
      continue
    random.Random(args.seed).shuffle(documents)
    write_tokens(args.out / f"{group}.bin.xz", documents, separator)
  (args.out / "corpus.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
  main()
