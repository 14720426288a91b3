"""Blocks of every type against a decoder of plain loops and against values of the gguf package."""

import struct
import unittest

import numpy as np
from ggufconv import dequant

# Offsets of the half-precision scales in a block.
HALVES = {2: [0], 3: [0, 2], 6: [0], 7: [0, 2], 8: [0], 12: [0, 2], 13: [0, 2], 14: [208]}

# Elements 0, 15, 16, 31 and, of 256, also 77, 128, 200, 255 of fixed_block(), as
# gguf 0.19's dequantize() gives them.
EXPECTED = {
    dequant.Q4_0: [
        "-0x1.3000000000000p-5", "0x1.c800000000000p-3", "0x1.7c00000000000p-3", "-0x1.3000000000000p-2",
    ],
    dequant.Q4_1: [
        "0x1.5800000000000p-4", "-0x1.0000000000000p-2", "0x1.8000000000000p-5", "0x1.9000000000000p-3",
    ],
    dequant.Q5_0: [
        "0x1.a200000000000p-2", "-0x1.0a00000000000p-1", "0x1.c800000000000p-4", "0x1.0a00000000000p-2",
    ],
    dequant.Q5_1: [
        "0x1.a700000000000p-1", "0x1.f800000000000p-2", "0x1.ba00000000000p-1", "0x1.ac00000000000p-2",
    ],
    dequant.Q8_0: [
        "-0x1.8580000000000p+0", "0x1.0a00000000000p-1", "0x1.e940000000000p+1", "-0x1.d180000000000p+1",
    ],
    dequant.Q4_K: [
        "0x1.9d70000000000p+3", "0x1.e840000000000p+3", "0x1.9d70000000000p+3", "0x1.e840000000000p+3",
        "0x1.da50000000000p+4", "0x1.35f8000000000p+4", "0x1.2e50000000000p+3", "0x1.13d0000000000p+5",
    ],
    dequant.Q5_K: [
        "0x1.2438000000000p+4", "0x1.e840000000000p+3", "0x1.2438000000000p+4", "0x1.e840000000000p+3",
        "0x1.da50000000000p+4", "0x1.37bc000000000p+5", "0x1.6750000000000p+3", "0x1.2df0000000000p+5",
    ],
    dequant.Q6_K: [
        "0x1.60b0000000000p+3", "0x1.40a0000000000p+4", "-0x1.94f0000000000p+4", "-0x1.7020000000000p+5",
        "0x1.b170000000000p+4", "0x1.0f0c000000000p+5", "-0x1.2ed0000000000p+4", "0x1.0a00000000000p+2",
    ],
}


def fixed_block(type_id):
    block = bytearray((i * 89 + 37) % 256 for i in range(dequant.BLOCKS[type_id][1]))
    for i, begin in enumerate(HALVES[type_id]):
        block[begin : begin + 2] = struct.pack("<e", 0.0371 if i == 0 else -0.25)
    return bytes(block)


def half(block, begin):
    return np.float32(struct.unpack_from("<e", block, begin)[0])


def k_scale(scales, j):
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    low = (scales[j + 4] & 15) | (scales[j - 4] >> 6) << 4
    return low, scales[j + 4] >> 4 | (scales[j] >> 6) << 4


def decode(type_id, b):
    """One block, element by element."""
    out = []
    if type_id in (dequant.Q4_K, dequant.Q5_K):
        five = type_id == dequant.Q5_K
        quants = 48 if five else 16
        for i in range(256):
            group = i // 32
            q = b[quants + group // 2 * 32 + i % 32] >> (4 * (group % 2)) & 15
            if five:
                q |= (b[16 + i % 32] >> group & 1) << 4
            scale, minimum = k_scale(b[4:16], group)
            d = half(b, 0) * np.float32(scale)
            out.append(d * np.float32(q) - half(b, 2) * np.float32(minimum))
        return out
    if type_id == dequant.Q6_K:
        for i in range(256):
            n, l, quarter = i // 128, i % 32, i % 128 // 32
            low = b[n * 64 + l + 32 * (quarter % 2)] >> (4 * (quarter // 2)) & 15
            high = b[128 + n * 32 + l] >> (2 * quarter) & 3
            scale = struct.unpack_from("b", b, 192 + i // 16)[0]
            out.append(half(b, 208) * np.float32(scale) * np.float32((low | high << 4) - 32))
        return out
    for i in range(32):
        if type_id == dequant.Q8_0:
            out.append(half(b, 0) * np.float32(struct.unpack_from("b", b, 2 + i)[0]))
            continue
        at = {dequant.Q4_0: 2, dequant.Q4_1: 4, dequant.Q5_0: 6, dequant.Q5_1: 8}[type_id]
        q = b[at + i % 16] >> (4 * (i // 16)) & 15
        if type_id in (dequant.Q5_0, dequant.Q5_1):
            q |= (struct.unpack_from("<I", b, at - 4)[0] >> i & 1) << 4
        if type_id == dequant.Q4_0:
            out.append(half(b, 0) * np.float32(q - 8))
        elif type_id == dequant.Q5_0:
            out.append(half(b, 0) * np.float32(q - 16))
        else:
            out.append(half(b, 0) * np.float32(q) + half(b, 2))
    return out


class DequantTest(unittest.TestCase):
    def test_every_quantized_type_equals_plain_loops(self):
        rng = np.random.default_rng(7)
        for type_id, halves in HALVES.items():
            with self.subTest(dequant.TYPE_NAMES[type_id]):
                blocks = []
                for _ in range(6):
                    block = bytearray(rng.integers(0, 256, dequant.BLOCKS[type_id][1], dtype=np.uint8))
                    for begin in halves:
                        block[begin : begin + 2] = struct.pack("<e", rng.normal())
                    blocks.append(bytes(block))
                expected = np.array([v for b in blocks for v in decode(type_id, b)], np.float32)
                actual = dequant.to_float32(b"".join(blocks), type_id)
                np.testing.assert_array_equal(actual, expected)

    def test_every_quantized_type_equals_the_gguf_package(self):
        for type_id, expected in EXPECTED.items():
            with self.subTest(dequant.TYPE_NAMES[type_id]):
                actual = dequant.to_float32(fixed_block(type_id), type_id)
                picked = [0, 15, 16, 31] + ([77, 128, 200, 255] if len(actual) == 256 else [])
                self.assertEqual([float(actual[i]).hex() for i in picked], expected)

    def test_plain_types(self):
        values = np.array([1.5, -0.0, 3.0e-5, 65504.0], np.float32)
        half_values = values.astype(np.float16)
        np.testing.assert_array_equal(dequant.to_float32(values.tobytes(), dequant.F32), values)
        np.testing.assert_array_equal(
            dequant.to_float32(half_values.tobytes(), dequant.F16), half_values.astype(np.float32)
        )
        bits = struct.pack("<3H", 0x3FC0, 0x8000, 0x4049)
        np.testing.assert_array_equal(
            dequant.to_float32(bits, dequant.BF16), np.float32([1.5, -0.0, 3.140625])
        )

    def test_all_types_named(self):
        for type_id in dequant.BLOCKS:
            self.assertIn(type_id, dequant.TYPE_NAMES)


class Bfloat16Test(unittest.TestCase):
    def check(self, bits, expected):
        value = np.array([bits], np.uint32).view(np.float32)
        self.assertEqual(hex(dequant.to_bfloat16(value)[0]), hex(expected))

    def test_rounds_to_nearest_ties_to_even(self):
        self.check(0x3F800000, 0x3F80)
        self.check(0x3F807FFF, 0x3F80)  # just below the middle
        self.check(0x3F808000, 0x3F80)  # the middle, even below
        self.check(0x3F808001, 0x3F81)  # just above
        self.check(0x3F818000, 0x3F82)  # the middle, even above
        self.check(0xBF818000, 0xBF82)
        self.check(0x80000000, 0x8000)  # -0
        self.check(0x00000001, 0x0000)  # the smallest subnormal

    def test_overflow_and_specials(self):
        self.check(0x7F7FFFFF, 0x7F80)  # the largest float is nearer to infinity
        self.check(0x7F800000, 0x7F80)
        self.check(0xFF800000, 0xFF80)
        self.check(0x7F800001, 0x7FC0)  # a NaN with low bits only stays one
        self.check(0xFFFFFFFF, 0xFFFF)


if __name__ == "__main__":
    unittest.main()
