"""Quantized blocks to float32, and float32 to bfloat16.

The block layouts are ggml's. All functions take blocks as uint8 [num_blocks, block_bytes]
and give float32 [num_blocks, block]; products and sums are rounded one by one, in ggml's order.
"""

import numpy as np

F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, BF16 = 0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 30

# Type -> (elements, bytes) of a block. These are the types that are read.
BLOCKS = {
    F32: (1, 4),
    F16: (1, 2),
    BF16: (1, 2),
    Q8_0: (32, 34),
    Q4_0: (32, 18),
    Q4_1: (32, 20),
    Q5_0: (32, 22),
    Q5_1: (32, 24),
    Q4_K: (256, 144),
    Q5_K: (256, 176),
    Q6_K: (256, 210),
}

# Every type's name, also of those that are refused.
TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8",
    25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4",
}  # fmt: skip


def _half(blocks, begin):
    return blocks[:, begin : begin + 2].copy().view("<f2").astype(np.float32)


def _nibbles(packed):
    """[n, bytes] -> [n, 2 * bytes]: first all low halves, then all high halves."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def _fifth_bits(blocks, begin):
    return np.unpackbits(blocks[:, begin : begin + 4], axis=1, bitorder="little") << 4


def _q4_0(b):
    return _half(b, 0) * (_nibbles(b[:, 2:18]).astype(np.float32) - 8)


def _q4_1(b):
    return _half(b, 0) * _nibbles(b[:, 4:20]).astype(np.float32) + _half(b, 2)


def _q5_0(b):
    return _half(b, 0) * ((_nibbles(b[:, 6:22]) | _fifth_bits(b, 2)).astype(np.float32) - 16)


def _q5_1(b):
    return _half(b, 0) * (_nibbles(b[:, 8:24]) | _fifth_bits(b, 4)).astype(np.float32) + _half(b, 2)


def _q8_0(b):
    return _half(b, 0) * b[:, 2:34].view(np.int8).astype(np.float32)


def _k_scales(packed):
    """The eight 6-bit scales and minima of a Q4_K or Q5_K block, [n, 12] -> two of [n, 8]."""
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, (c & 15) | ((a >> 6) << 4)], axis=1)
    minima = np.concatenate([b & 63, (c >> 4) | ((b >> 6) << 4)], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _k_values(b, quants):
    """quants [n, 8, 32] with the scales at bytes 0..16 -> [n, 256]."""
    scales, minima = _k_scales(b[:, 4:16])
    scale = (_half(b, 0) * scales)[:, :, None]
    minimum = (_half(b, 2) * minima)[:, :, None]
    return (scale * quants.astype(np.float32) - minimum).reshape(len(b), 256)


def _k_nibbles(packed):
    """[n, 128] -> [n, 8, 32]: each 32 bytes hold one group in the low and the next in the high half."""
    groups = packed.reshape(len(packed), 4, 1, 32)
    return np.concatenate([groups & 15, groups >> 4], axis=2).reshape(len(packed), 8, 32)


def _q4_k(b):
    return _k_values(b, _k_nibbles(b[:, 16:144]))


def _q5_k(b):
    bits = (b[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[None, :, None]) & 1
    return _k_values(b, _k_nibbles(b[:, 48:176]) | (bits << 4))


def _q6_k(b):
    n = len(b)
    low = b[:, 0:128].reshape(n, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=2).reshape(n, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    high = (b[:, 128:192].reshape(n, 2, 1, 32) >> shifts) & 3
    quants = (low | (high << 4)).astype(np.int8) - np.int8(32)
    scale = _half(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    return (scale[:, :, None] * quants.reshape(n, 16, 16).astype(np.float32)).reshape(n, 256)


_DECODERS = {
    Q4_0: _q4_0,
    Q4_1: _q4_1,
    Q5_0: _q5_0,
    Q5_1: _q5_1,
    Q8_0: _q8_0,
    Q4_K: _q4_k,
    Q5_K: _q5_k,
    Q6_K: _q6_k,
}


def to_float32(data, type_id):
    """The values of whole blocks in `data` (bytes), as a float32 vector."""
    raw = np.frombuffer(data, dtype=np.uint8)
    if type_id == F32:
        return raw.view("<f4").astype(np.float32)
    if type_id == F16:
        return raw.view("<f2").astype(np.float32)
    if type_id == BF16:
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return _DECODERS[type_id](raw.reshape(-1, BLOCKS[type_id][1])).reshape(-1)


def to_bfloat16(values):
    """float32 -> bfloat16 bits (uint16), to nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), ((bits >> 16) | 0x40).astype(np.uint16), rounded)
