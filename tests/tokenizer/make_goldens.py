#!/usr/bin/env python3
"""Writes golden/*.json: what the `tokenizers` library says of texts made here.

    python3 -m venv /tmp/goldens && /tmp/goldens/bin/pip install tokenizers==0.23.3
    /tmp/goldens/bin/python tests/tokenizer/make_goldens.py \
        --smollm2 ~/.cache/winnow/models/SmolLM2-135M-Instruct --data ../shared/data

smollm2.json, qwen2.json   ids of texts from the generator below, and for the WikiText-2
                           test split only counts and checksums: the text stays outside.
small.json                 a vocabulary of 300 tokens under many pre-tokenizers and
                           added-token flags: tokenizer, texts, ids and decoded text.
"""

import argparse
import json
import random
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import tokenizers

QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

WORDS = """the a of to in river winnow grain wheat chaff engine cache token page ring survivor
memory bytes window decode prefill transfer router streams quietly slowly measured because
whatever Thursday NASA HTTPServer getElementById snake_case camelCase don't we're I'll it's
o'clock naive naïve café Straße Ångström coöperate über jalapeño""".split()
OTHER = ["Привет, мир!", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया", "สวัสดีชาวโลก",
         "你好，世界。", "こんにちは世界", "안녕하세요 세계", "각각", "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽", "e\u0301a\u0323\u0301 ộ",
         "ﬁﬂ ½ Ⅷ ²³", "\u00a0\u3000\u2003\u180e.", "\u2028x\u2029", "zero\u200bwidth\u200djoin\ufeff"]
CODE = ["for (int i = 0; i < n; ++i) {\n\tsum += x[i];\n}", "def f(x):\n    return x ** 2\n",
        "SELECT * FROM t WHERE a = 'b';", "<p class=\"x\">&amp;</p>", "{\"k\": [1, 2.5e-3, null]}",
        "$ git log --oneline | head -n 20", "x=1\r\ny=2\r\n", "\\begin{align} a^2 + b_1 \\end{align}"]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start", "|im_end|>", "<file_sep>"]


def texts(seed, count):
    """Sentences, numbers, code, scripts, white space and special tokens, mixed."""
    rng = random.Random(seed)
    result = ["", " ", "\n", "a", "  a", "Hello, world!", "<|im_start|>user\nHi<|im_end|>\n"]
    while len(result) < count:
        parts = []
        for _ in range(rng.randint(1, 6)):
            kind = rng.random()
            if kind < 0.4:
                parts.append(" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))
                             + rng.choice([".", ",", "?", "!", ";", "...", ""]))
            elif kind < 0.5:
                parts.append(str(rng.randint(0, 10 ** rng.randint(1, 12))))
            elif kind < 0.6:
                parts.append(rng.choice(CODE))
            elif kind < 0.75:
                parts.append(rng.choice(OTHER))
            elif kind < 0.85:
                parts.append("".join(rng.choice(" \t\n\r") for _ in range(rng.randint(1, 5))))
            elif kind < 0.9:
                parts.append(rng.choice(SPECIAL))
            else:
                parts.append("".join(chr(rng.choice([rng.randint(0x20, 0x7e),
                                                     rng.randint(0xa0, 0x2fff),
                                                     rng.randint(0x1f300, 0x1f64f)]))
                                     for _ in range(rng.randint(1, 8))))
        result.append(rng.choice(["", " "]).join(parts))
    return result


def crc(ids):
    return zlib.crc32(struct.pack(f"<{len(ids)}i", *ids))


def encode(tokenizer, text, parse_special):
    tokenizer.encode_special_tokens = not parse_special
    return tokenizer.encode(text, add_special_tokens=False).ids


def row(tokenizer, text):
    """Ids; and where they differ from `text`: what the ids decode to, with and without special
    tokens; and from the ids: those with special tokens read as text."""
    ids = encode(tokenizer, text, True)
    result = {"ids": ids}
    plain = encode(tokenizer, text, False)
    if plain != ids:
        result["plain_ids"] = plain
    for key, skip in (("decoded", False), ("skipped", True)):
        decoded = tokenizer.decode(ids, skip_special_tokens=skip)
        if decoded != text:
            result[key] = decoded
    return result


def golden(tokenizer, name, wiki, out):
    lines = wiki.split("\n")
    blocks = []
    for first in range(0, len(lines), 100):
        block = lines[first:first + 100]
        ids = encode(tokenizer, "\n".join(block), True)
        counts = [len(encode(tokenizer, line, True)) for line in block]
        blocks.append({"count": len(ids), "crc32": crc(ids), "line_counts": counts})
    whole = encode(tokenizer, wiki, True)
    cases = [{"text": text, **row(tokenizer, text)} for text in texts(name, 300)]
    write(out / f"{name}.json", {
        "tokenizers": tokenizers.__version__,
        "wiki": {"count": len(whole), "crc32": crc(whole), "blocks": blocks},
        "cases": cases})


def byte_spellings():
    plain = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    rest = iter(range(0x100, 0x200))
    return [chr(b if b in plain else next(rest)) for b in range(256)]


def added(id, content, **flags):
    return {"id": id, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": False, **flags}


def byte_level(**flags):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
            "use_regex": False, **flags}


def split(behavior, pattern, invert=False, kind="Regex"):
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def small(out):
    """The base tokenizer.json, and JSON merge patches (RFC 7396) that make the others."""
    vocab = {s: i for i, s in enumerate(byte_spellings())}
    merges = ["a b", "b c", "ab c", "Ġ a", "Ġ Ġ", "ĠĠ ĠĠ", "Ċ Ċ", "1 2", "12 3", "a a", "aa aa",
              "Ġ ab", "Ġa b", "x y", "xy z", "y z", "x yz", "c a", "ca b", "Ã ©"]
    for merge in merges:
        vocab.setdefault(merge.replace(" ", ""), len(vocab))
    n = len(vocab)
    base = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
            "normalizer": None, "pre_tokenizer": byte_level(use_regex=True),
            "post_processor": None, "decoder": byte_level(),
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": vocab, "merges": merges}}
    variants = {"gpt2": {}, "prefix_space": {"pre_tokenizer": byte_level(use_regex=True,
                                                                         add_prefix_space=True)},
                "no_regex": {"pre_tokenizer": byte_level()},
                "merge_pairs": {"model": {"merges": [m.split(" ") for m in merges]}},
                "ignore_merges": {"model": {"ignore_merges": True, "merges": merges[:4]}},
                "nfc": {"normalizer": {"type": "NFC"}},
                "nfc_sequence": {"normalizer": {"type": "Sequence",
                                                "normalizers": [{"type": "NFC"}]}}}
    for name, regex in (("qwen2", QWEN2), ("llama3", LLAMA3)):
        variants[name] = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            split("Isolated", regex), byte_level()]}}
    for individual in (True, False):
        variants[f"digits_{individual}"] = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": individual},
            byte_level(use_regex=True, add_prefix_space=not individual)]}}
    for behavior in ("Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext"):
        for invert in (False, True):
            variants[f"split_{behavior}_{invert}"] = {"pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [split(behavior, r"[ab\s]", invert), byte_level()]}}
    variants["split_string"] = {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        split("Isolated", "a.b", kind="String"), byte_level()]}}
    without = {s: i for s, i in vocab.items() if s not in ("z", "q", "Ã")}
    drop = {"z": None, "q": None, "xyz": None, "yz": None, "Ã": None, "Ã©": None}
    few = [m for m in merges if m.replace(" ", "") in without and "z" not in m and "Ã" not in m]
    variants["missing_bytes"] = {"model": {"vocab": drop, "merges": few}}
    variants["unk"] = {"model": {"vocab": drop, "merges": few, "unk_token": "w"}}
    variants["fuse_unk"] = {"model": {"vocab": drop, "merges": few, "unk_token": "w",
                                      "fuse_unk": True}}
    variants["added"] = {"added_tokens": [
        added(n, "<|s|>", special=True), added(n + 1, "<|s|>x", special=True), added(n + 2, "<|"),
        added(n + 3, "word", single_word=True), added(n + 4, "[L]", lstrip=True),
        added(n + 5, "[R]", rstrip=True), added(n + 6, "[B]", lstrip=True, rstrip=True,
                                                special=True),
        added(n + 7, "a b c"), added(vocab["abc"], "abc", special=True)]}
    variants["added_normalized"] = {"normalizer": {"type": "NFC"}, "added_tokens": [
        added(n, "e\u0301!", normalized=True), added(n + 1, "e\u0301?"),
        added(n + 2, "\u00e9#", normalized=True, single_word=True)]}
    cases = [
        "", "Hello, World's 12 345 678!", "I'll  don't 'Re\t\t x\r\n\n y ", "  \n \u3000\u180e.\u0085",
        "naïve é e\u0301 \u0301 a\u0323\u0301 각 ½Ⅷ١ 你好 👍🏽",
        "abc abcabc aaaaaaa xyz xyzz qqz", "word sword word1 word_ (word) wordé word", "aword,word.",
        "x  [L]  [R]  y [B] z", " [L][R] [B] [L]", "<|s|><|s|>x<|s|>y<|s<|", "a b c abc a b  c",
        "e\u0301!e\u0301?e\u0301# é! é? é# xé#", "a.bb.axb a.b.a", "ab  ba\n\nab12 123 1234"]
    result = []
    for name, patch in variants.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            path.write_text(json.dumps(merge_patch(base, patch)))
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        rows = []
        for text in cases:
            rows.append(row(tokenizer, text))
        result.append({"name": name, "patch": patch, "rows": rows})
    write(out / "small.json", {"tokenizers": tokenizers.__version__, "base": base,
                               "texts": cases, "variants": result})


def merge_patch(target, patch):
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def qwen2(data):
    """Qwen2's tokenizer.json from its older files."""
    folder = data / "qwen2_tokenizer"
    merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return {"version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": int(id), **token}
                             for id, token in config["added_tokens_decoder"].items()],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("Isolated", QWEN2),
                                                                    byte_level()]},
            "post_processor": byte_level(), "decoder": byte_level(),
            "model": {"type": "BPE", "dropout": None, "unk_token": None,
                      "continuing_subword_prefix": "", "end_of_word_suffix": "",
                      "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": json.loads((folder / "vocab.json").read_text(encoding="utf-8")),
                      "merges": [m for m in merges if m and not m.startswith("#version")]}}


def write(path, value):
    """One line for each entry of a list: diffs stay readable."""
    parts = []
    for key, entry in value.items():
        if isinstance(entry, list):
            rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in entry)
            parts.append(f"{json.dumps(key)}: [\n{rows}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(entry, separators=(',', ':'))}")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smollm2", type=Path, required=True, help="its directory")
    parser.add_argument("--data", type=Path, required=True,
                        help="folder of wiki.test.raw and qwen2_tokenizer/")
    args = parser.parse_args()
    out = Path(__file__).parent / "golden"
    with open(args.data / "wiki.test.raw", encoding="utf-8", newline="") as file:
        wiki = file.read()
    small(out)
    golden(tokenizers.Tokenizer.from_file(str(args.smollm2 / "tokenizer.json")), "smollm2", wiki,
           out)
    golden(tokenizers.Tokenizer.from_str(json.dumps(qwen2(args.data))), "qwen2", wiki, out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
