#!/usr/bin/env python3
"""Makes the reference values in tests/golden/ with torch and transformers.

    scripts/make_goldens.py MODEL_DIR [--out tests/golden] [--only tiny|smollm2]

MODEL_DIR is SmolLM2-135M-Instruct as scripts/convert_gguf.py writes it. Everything is computed
in float32 on the BF16 weights, on the CPU. Nothing in the build or in scripts/test needs this
program: its output is committed. Every JSON file says which versions made it. The files:

tiny_llama/, tiny_qwen3/   checkpoints of a few thousand random weights (numpy's PCG64, seeds in
                           TINY below) with a tokenizer of single bytes. tiny_llama has its own
                           lm_head and llama3 rope scaling that acts within 64 tokens; tiny_qwen3
                           has tied embeddings and head_dim != hidden / heads.
tiny_llama.json, tiny_qwen3.json
                           sequences: token_ids, positions, logits [positions][vocab] at those
                           positions, and logits_bf16_kv: the same with K (after RoPE) and V
                           rounded to BF16 before attention, as a dense-bf16 cache stores them.
                           greedy: prompt_ids and 32 further token_ids with margins.
smollm2_greedy.json        prompts: prompt (text), chat, prompt_ids, then 64 greedy token_ids
                           (end ids do not stop it), margins[i] = top-1 minus top-2 logit of step i.
smollm2_text.json          english.txt: token_ids (no BOS), nll[i] = -log p(token i + 1 | 0..i),
                           mean_nll, mean_nll_bf16_kv, and every 16th position's 64 most likely
                           tokens: top[j] = {position, ids, logprobs}.
"""

import argparse
import json
import os
import sys

import numpy as np
import torch
import transformers
from transformers.models.llama.modeling_llama import eager_attention_forward

from ggufconv.dequant import to_bfloat16
from ggufconv.hf_tokenizer import _byte_level

PROMPTS = [
    (True, "What is the capital of France?"),
    (True, "Name three rivers."),
    (True, "Write a short poem about the sea."),
    (True, "Explain in two sentences why the sky is blue."),
    (True, "List the first five prime numbers and say why one is not among them."),
    (False, "Once upon a time"),
    (False, "The"),
    (False, "def fibonacci(n):\n    "),
    (False, "Water boils at 100 degrees Celsius, which is"),
    (False, None),  # the first 1200 characters of english.txt
]

TINY = {
    "tiny_llama": {
        "seed": 20240611,
        "config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
        },
    },
    "tiny_qwen3": {
        "seed": 20250429,
        "config": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "use_sliding_window": False,
        },
    },
}
TINY_SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "vocab_size": 264,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 256,
    "eos_token_id": 257,
}
TINY_SPECIAL = ["<|im_start|>", "<|im_end|>"]  # ids 256, 257
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] +"
    " '<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% endif %}"
)


def byte_spelling():
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {byte: chr(byte) for byte in printable}
    rest = (byte for byte in range(256) if byte not in spelling)
    spelling.update({byte: chr(256 + i) for i, byte in enumerate(rest)})
    return [spelling[byte] for byte in range(256)]


def write_json(path, value, indent=1):
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def tiny_tensors(config, seed):
    """Name -> float32 values, drawn in this order from one generator."""
    rng = np.random.default_rng(seed)
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    dim = config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    tensors = {}

    def matrix(name, rows, columns, gain=1.0):
        tensors[name] = rng.normal(0, gain / np.sqrt(columns), (rows, columns)).astype(np.float32)

    def norm(name, size):
        tensors[name] = rng.uniform(0.5, 1.5, size).astype(np.float32)

    matrix("model.embed_tokens.weight", vocab, hidden, gain=4.0)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norm(prefix + "input_layernorm.weight", hidden)
        matrix(prefix + "self_attn.q_proj.weight", q, hidden, gain=2.0)
        matrix(prefix + "self_attn.k_proj.weight", kv, hidden, gain=2.0)
        matrix(prefix + "self_attn.v_proj.weight", kv, hidden)
        matrix(prefix + "self_attn.o_proj.weight", hidden, q)
        if config["model_type"] == "qwen3":
            norm(prefix + "self_attn.q_norm.weight", dim)
            norm(prefix + "self_attn.k_norm.weight", dim)
        norm(prefix + "post_attention_layernorm.weight", hidden)
        matrix(prefix + "mlp.gate_proj.weight", ffn, hidden)
        matrix(prefix + "mlp.up_proj.weight", ffn, hidden)
        matrix(prefix + "mlp.down_proj.weight", hidden, ffn)
    norm("model.norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head.weight", vocab, hidden, gain=4.0)
    return tensors


def write_tiny(directory, config, seed):
    os.makedirs(directory, exist_ok=True)
    write_json(os.path.join(directory, "config.json"), config, indent=2)
    write_json(
        os.path.join(directory, "generation_config.json"),
        {"bos_token_id": 256, "eos_token_id": [257]},
        indent=2,
    )
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, values in tiny_tensors(config, seed).items():
        raw = to_bfloat16(values).astype("<u2").tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(os.path.join(directory, "model.safetensors"), "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + data)
    added = [
        {
            "id": 256 + i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, token in enumerate(TINY_SPECIAL)
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": _byte_level(True),
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(byte_spelling())},
            "merges": [],
        },
    }
    write_json(os.path.join(directory, "tokenizer.json"), tokenizer, indent=None)
    write_json(
        os.path.join(directory, "tokenizer_config.json"),
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "bos_token": TINY_SPECIAL[0],
            "eos_token": TINY_SPECIAL[1],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHATML,
        },
        indent=2,
    )


def attention_bf16_kv(module, query, key, value, attention_mask, **kwargs):
    key, value = key.bfloat16().float(), value.bfloat16().float()
    return eager_attention_forward(module, query, key, value, attention_mask, **kwargs)


transformers.AttentionInterface.register("bf16_kv", attention_bf16_kv)
transformers.AttentionMaskInterface.register(
    "bf16_kv", transformers.masking_utils.eager_mask
)


def load(directory, attention):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )
    return model.eval()


@torch.no_grad()
def all_logits(model, ids):
    return model(torch.tensor([ids])).logits[0]


@torch.no_grad()
def greedy(model, prompt_ids, steps):
    ids, margins = [], []
    out = model(torch.tensor([prompt_ids]), use_cache=True)
    while True:
        top = out.logits[0, -1].topk(2)
        ids.append(int(top.indices[0]))
        margins.append(round(float(top.values[0] - top.values[1]), 5))
        if len(ids) == steps:
            return ids, margins
        step = torch.tensor([[ids[-1]]])
        out = model(step, past_key_values=out.past_key_values, use_cache=True)


def made_with():
    return {"torch": torch.__version__, "transformers": transformers.__version__, "dtype": "float32"}


def rounded(tensor, digits):
    return [round(float(v), digits) for v in tensor]


def make_tiny(out, name):
    config = {**TINY[name]["config"], **TINY_SHAPE}
    directory = os.path.join(out, name)
    write_tiny(directory, config, TINY[name]["seed"])
    model, model_bf16_kv = load(directory, "eager"), load(directory, "bf16_kv")
    rng = np.random.default_rng(TINY[name]["seed"] + 1)
    sequences = []
    for length in (1, 2, 33, 200):
        ids = [int(i) for i in rng.integers(0, 256, length)]
        positions = sorted({0, 1, 16, 31, 32, 63, 64, 127, 128, 199, length - 1} & set(range(length)))
        logits, logits_bf16_kv = all_logits(model, ids), all_logits(model_bf16_kv, ids)
        sequences.append(
            {
                "token_ids": ids,
                "positions": positions,
                "logits": [rounded(logits[p], 6) for p in positions],
                "logits_bf16_kv": [rounded(logits_bf16_kv[p], 6) for p in positions],
            }
        )
        gap = (logits - logits_bf16_kv).abs().max() / logits.abs().max()
        print(f"{name}: length {length}, BF16 K and V move the logits by {gap:.1e} of their maximum")
    prompt_ids = [int(i) for i in rng.integers(0, 256, 12)]
    token_ids, margins = greedy(model, prompt_ids, 32)
    result = {
        "made_with": made_with(),
        "seed": TINY[name]["seed"],
        "sequences": sequences,
        "greedy": {"prompt_ids": prompt_ids, "token_ids": token_ids, "margins": margins},
    }
    write_json(os.path.join(out, f"{name}.json"), result, indent=None)


def make_smollm2(model_dir, out):
    with open(os.path.join(out, "english.txt"), encoding="utf-8") as file:
        text = file.read()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = load(model_dir, "eager")
    prompts = []
    for chat, prompt in PROMPTS:
        prompt = text[:1200] if prompt is None else prompt
        rendered = prompt
        if chat:
            messages = [{"role": "user", "content": prompt}]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        token_ids, margins = greedy(model, prompt_ids, 64)
        print(f"{prompt[:40]!r}: {tokenizer.decode(token_ids)[:90]!r}, least margin {min(margins)}")
        prompts.append(
            {
                "prompt": prompt,
                "chat": chat,
                "prompt_ids": prompt_ids,
                "token_ids": token_ids,
                "margins": margins,
            }
        )
    model_name = "SmolLM2-135M-Instruct, Q4_1 GGUF as BF16"
    write_json(
        os.path.join(out, "smollm2_greedy.json"),
        {"made_with": made_with(), "model": model_name, "prompts": prompts},
        indent=None,
    )

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    target = torch.tensor(ids[1:])
    logprobs = all_logits(model, ids)[:-1].log_softmax(-1)
    nll = -logprobs.gather(1, target[:, None])[:, 0]
    top = []
    for position in range(0, len(ids) - 1, 16):
        best = logprobs[position].topk(64)
        top.append(
            {
                "position": position,
                "ids": best.indices.tolist(),
                "logprobs": rounded(best.values, 5),
            }
        )
    del model
    logprobs_bf16_kv = all_logits(load(model_dir, "bf16_kv"), ids)[:-1].log_softmax(-1)
    nll_bf16_kv = -logprobs_bf16_kv.gather(1, target[:, None])[:, 0]
    kld = (logprobs.exp() * (logprobs - logprobs_bf16_kv)).sum(-1).mean()
    print(f"english.txt: {len(ids)} tokens, NLL {nll.mean():.5f}, with BF16 K and V {nll_bf16_kv.mean():.5f}")
    print(f"KLD of BF16 K and V against float32: {kld:.2e}")
    result = {
        "made_with": made_with(),
        "model": model_name,
        "token_ids": ids,
        "mean_nll": round(float(nll.mean()), 6),
        "mean_nll_bf16_kv": round(float(nll_bf16_kv.mean()), 6),
        "kld_bf16_kv": float(f"{kld:.3e}"),
        "nll": rounded(nll, 5),
        "top": top,
    }
    write_json(os.path.join(out, "smollm2_text.json"), result, indent=None)


def main():
    parser = argparse.ArgumentParser(description="Makes the reference values in tests/golden/.")
    parser.add_argument("model_dir")
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--out", default=os.path.join(here, "..", "tests", "golden"))
    parser.add_argument("--only", choices=("tiny", "smollm2"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # repeatable, and quick beside other work
    if args.only != "smollm2":
        for name in TINY:
            make_tiny(args.out, name)
    if args.only != "tiny":
        make_smollm2(args.model_dir, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
