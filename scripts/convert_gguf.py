#!/usr/bin/env python3
"""Turns a Llama or Qwen3 GGUF file into a model directory in the Hugging Face layout.

    scripts/convert_gguf.py MODEL.gguf DIRECTORY

The directory gets config.json, model.safetensors (BF16), tokenizer.json, tokenizer_config.json,
special_tokens_map.json, generation_config.json, where the file has one chat_template.jinja, and
conversion.json, which names the source.
It appears when all of it is written and checked, or not at all. Needs Python 3.8 and numpy.

Exit codes: 0 done; 2 the file cannot be converted or the directory not written (one sentence on
standard error says why); 130 interrupted.
"""

import argparse
import hashlib
import os
import signal
import sys
import time

try:
    import numpy  # noqa: F401
except ImportError:
    sys.exit("convert_gguf.py: numpy is missing (Debian package python3-numpy)")

from ggufconv.errors import ConversionError
from ggufconv.hf_model import HfModel
from ggufconv.hf_tokenizer import HfTokenizer
from ggufconv.output import NewDirectory, num_values, write_safetensors
from ggufconv.reader import GgufFile

# Goes up when the same source gives other files.
FORMAT = 1

# Beside the weights: the tokenizer's files, and a little air.
_SPARE_BYTES = 64 << 20


class Progress:
    """A bar on a terminal, a line every quarter elsewhere; nothing if quiet."""

    def __init__(self, label, quiet):
        self._label = label
        self._quiet = quiet
        self._tty = sys.stderr.isatty()
        self._shown = -1 if self._tty else 0
        self._start = time.monotonic()

    def __call__(self, done, total):
        percent = 100 * done // total
        step = percent if self._tty else percent // 25
        if self._quiet or step == self._shown:
            return
        self._shown = step
        line = f"{self._label}: {percent:3d} % of {total >> 20} MiB"
        if self._tty:
            bar = "#" * (percent * 30 // 100)
            end = "\n" if done == total else ""
            print(f"\r{line} [{bar:<30}] {time.monotonic() - self._start:3.0f} s", end=end, file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)


def check_sha256(path, expected):
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except OSError as e:
        raise ConversionError(f"cannot read {path}: {e.strerror}") from e
    if digest.hexdigest() != expected:
        raise ConversionError(f"wrong checksum: {path} has sha256 {digest.hexdigest()}, not {expected}")


def convert(source, target, sha256=None, force=False, quiet=False):
    """Raises ConversionError; then `target` is as it was before."""
    if sha256 is not None:
        check_sha256(source, sha256)
    gguf = GgufFile(source)
    try:
        model = HfModel(gguf)
        tokenizer = HfTokenizer(gguf, model.context)
        num_bytes = sum(2 * num_values(tensor) for tensor in model.tensors) + _SPARE_BYTES
        with NewDirectory(target, num_bytes, force) as directory:
            progress = Progress(f"converting {os.path.basename(source)}", quiet)
            write_safetensors(os.path.join(directory.path, "model.safetensors"), model, progress)
            directory.write_json("config.json", model.config)
            directory.write_json("tokenizer.json", tokenizer.tokenizer, indent=None)
            directory.write_json("tokenizer_config.json", tokenizer.tokenizer_config)
            directory.write_json("special_tokens_map.json", tokenizer.special_tokens_map)
            directory.write_json("generation_config.json", tokenizer.generation_config)
            if tokenizer.chat_template is not None:
                directory.write_text("chat_template.jinja", tokenizer.chat_template)
            origin = {"source": os.path.basename(source), "sha256": sha256, "format": FORMAT}
            directory.write_json("conversion.json", origin)
    finally:
        gguf.close()


def main():
    parser = argparse.ArgumentParser(
        description="Turns a Llama or Qwen3 GGUF file into a model directory in the Hugging Face layout."
    )
    parser.add_argument("source", metavar="MODEL.gguf")
    parser.add_argument("target", metavar="DIRECTORY", help="is created; must not exist")
    parser.add_argument("--sha256", metavar="HEX", help="refuse a source with another checksum")
    parser.add_argument("--force", action="store_true", help="replace DIRECTORY if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        convert(args.source, args.target, args.sha256, args.force, args.quiet)
    except ConversionError as e:
        print(f"convert_gguf.py: {e}", file=sys.stderr)
        return 2
    except MemoryError:
        print("convert_gguf.py: out of memory", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_gguf.py: interrupted, nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
