"""Writes small GGUF files for the tests, and reads back what the converter makes of them."""

import json
import os
import struct

import numpy as np

U32, F32_VALUE, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9


def string(text):
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(content):
    """A metadata value with its type in front."""
    if isinstance(content, bool):
        return struct.pack("<I?", BOOL, content)
    if isinstance(content, int):
        return struct.pack("<II", U32, content)
    if isinstance(content, float):
        return struct.pack("<If", F32_VALUE, content)
    if isinstance(content, str):
        return struct.pack("<I", STRING) + string(content)
    element = STRING if isinstance(content[0], str) else U32
    body = b"".join(string(c) if element == STRING else struct.pack("<I", c) for c in content)
    return struct.pack("<IIQ", ARRAY, element, len(content)) + body


def gguf(metadata, tensors, version=3):
    """tensors: name -> (row-major shape, type id, bytes)."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for name, content in metadata.items():
        out += string(name) + value(content)
    offset, data = 0, b""
    for name, (shape, type_id, raw) in tensors.items():
        dims = shape[::-1]
        out += string(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        out += struct.pack("<IQ", type_id, offset)
        raw += b"\0" * (-len(raw) % 32)
        data += raw
        offset += len(raw)
    return out + b"\0" * (-len(out) % 32) + data


HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 96, 2
TOKENS = ["<|endoftext|>", "<|im_end|>", *"abcdefgh", "ab", "abc", "Ġ"]
TEMPLATE = "{{ messages[0]['content'] }}"


def metadata(arch, head_dim):
    return {
        "general.architecture": arch,
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": FFN,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(TOKENS) - 2),
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def permute(rows, heads):
    """llama.cpp's row order of q and k for 'llama' models."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def model(arch="llama", tied=True, seed=1):
    """(metadata, tensors as gguf() takes them, Hugging Face name -> float32 values)."""
    head_dim = 16 if arch == "llama" else 32
    rng = np.random.default_rng(seed)
    tensors, expected = {}, {}

    def add(name, hf_name, *shape, heads=0):
        values = rng.normal(0, 1, shape).astype(np.float32)
        expected[hf_name] = values
        stored = permute(values, heads) if heads and arch == "llama" else values
        tensors[name] = (list(shape), 0, stored.tobytes())

    add("token_embd.weight", "model.embed_tokens.weight", len(TOKENS), HIDDEN)
    for i in range(LAYERS):
        blk, layer = f"blk.{i}.", f"model.layers.{i}."
        q, kv = HEADS * head_dim, KV_HEADS * head_dim
        add(blk + "attn_norm.weight", layer + "input_layernorm.weight", HIDDEN)
        add(blk + "attn_q.weight", layer + "self_attn.q_proj.weight", q, HIDDEN, heads=HEADS)
        add(blk + "attn_k.weight", layer + "self_attn.k_proj.weight", kv, HIDDEN, heads=KV_HEADS)
        add(blk + "attn_v.weight", layer + "self_attn.v_proj.weight", kv, HIDDEN)
        add(blk + "attn_output.weight", layer + "self_attn.o_proj.weight", HIDDEN, q)
        if arch == "qwen3":
            add(blk + "attn_q_norm.weight", layer + "self_attn.q_norm.weight", head_dim)
            add(blk + "attn_k_norm.weight", layer + "self_attn.k_norm.weight", head_dim)
        add(blk + "ffn_norm.weight", layer + "post_attention_layernorm.weight", HIDDEN)
        add(blk + "ffn_gate.weight", layer + "mlp.gate_proj.weight", FFN, HIDDEN)
        add(blk + "ffn_up.weight", layer + "mlp.up_proj.weight", FFN, HIDDEN)
        add(blk + "ffn_down.weight", layer + "mlp.down_proj.weight", HIDDEN, FFN)
    add("output_norm.weight", "model.norm.weight", HIDDEN)
    if not tied:
        add("output.weight", "lm_head.weight", len(TOKENS), HIDDEN)
    return metadata(arch, head_dim), tensors, expected


def read_json(directory, name):
    with open(os.path.join(directory, name), encoding="utf-8") as file:
        return json.load(file)


def read_safetensors(path):
    """Name -> BF16 bits, with the tensor's shape."""
    with open(path, "rb") as file:
        data = file.read()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    result = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        bits = np.frombuffer(data[8 + size + begin : 8 + size + end], dtype="<u2")
        result[name] = bits.reshape(entry["shape"])
    return result
