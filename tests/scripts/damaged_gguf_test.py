"""Truncated and altered files: one ConversionError or a conversion, never anything else."""

import os
import random
import struct
import tempfile
import time
import tracemalloc
import unittest

import convert_gguf
import tiny_gguf
from ggufconv.errors import ConversionError


class DamagedTest(unittest.TestCase):
    def setUp(self):
        self._temp = tempfile.TemporaryDirectory()
        self.addCleanup(self._temp.cleanup)
        self.source = os.path.join(self._temp.name, "tiny.gguf")
        self.target = os.path.join(self._temp.name, "model")
        metadata, tensors, _ = tiny_gguf.model("llama")
        self.whole = tiny_gguf.gguf(metadata, tensors)
        self.header_size = len(self.whole) - sum((len(t[2]) + 31) // 32 * 32 for t in tensors.values())

    def error(self, data):
        """The message of the refusal, or None if `data` converts."""
        with open(self.source, "wb") as file:
            file.write(data)
        try:
            convert_gguf.convert(self.source, self.target, force=True, quiet=True)
            return None
        except ConversionError as e:
            self.assertIn("tiny.gguf", str(e))
            self.assertNotIn("\n", str(e))
            self.assertFalse([n for n in os.listdir(self._temp.name) if n.startswith(".")])
            return str(e)

    def test_cut_anywhere(self):
        self.assertIsNone(self.error(self.whole))
        cuts = [*range(0, self.header_size, 13), self.header_size, len(self.whole) // 2, len(self.whole) - 1]
        for cut in cuts:
            with self.subTest(cut):
                self.assertIsNotNone(self.error(self.whole[:cut]))

    def test_altered_headers(self):
        rng = random.Random(11)
        refused = 0
        for _ in range(400):
            data = bytearray(self.whole)
            for _ in range(rng.choice((1, 1, 4))):
                data[rng.randrange(self.header_size)] = rng.randrange(256)
            refused += self.error(bytes(data)) is not None
        self.assertGreater(refused, 100)

    def test_claimed_sizes_cost_nothing(self):
        start = time.monotonic()
        tracemalloc.start()
        for at, claim in ((8, 1 << 40), (16, 1 << 40), (24, 1 << 62), (24, (1 << 64) - 1)):
            data = bytearray(self.whole)
            data[at : at + 8] = struct.pack("<Q", claim)
            self.assertIsNotNone(self.error(bytes(data)))
        array = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + tiny_gguf.string("x")
        for element in (4, 8, 9, 99):
            self.assertIsNotNone(self.error(array + struct.pack("<IIQ", 9, element, 1 << 60) + bytes(64)))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.assertLess(peak, 16 << 20)
        self.assertLess(time.monotonic() - start, 20)

    def test_named(self):
        self.assertIn("no GGUF file", self.error(b"PK\3\4" + bytes(100)))
        self.assertIn("no GGUF file", self.error(b""))
        self.assertIn("version 1", self.error(b"GGUF" + struct.pack("<I", 1) + self.whole[8:]))
        self.assertIn("big-endian", self.error(b"GGUF" + struct.pack(">I", 3) + self.whole[8:]))
        self.assertIn("truncated", self.error(self.whole[:-1]))


if __name__ == "__main__":
    unittest.main()
