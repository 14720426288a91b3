import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

torch.set_num_threads(1)  # Tiny tensors: threads only wait for each other.

TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
        "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}


def write_model(path, **changes):
  """A random two-layer model as a Hugging Face directory, with a byte-level tokenizer."""
  config = TINY | changes
  generator = torch.Generator().manual_seed(0)
  draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.3
  h, f, d = config["hidden_size"], config["intermediate_size"], config["head_dim"]
  q, kv = config["num_attention_heads"] * d, config["num_key_value_heads"] * d
  tensors = {"model.embed_tokens.weight": draw(config["vocab_size"], h), "model.norm.weight": torch.ones(h)}
  for i in range(config["num_hidden_layers"]):
    for name, shape in {"self_attn.q_proj": (q, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
                        "self_attn.o_proj": (h, q), "mlp.gate_proj": (f, h), "mlp.up_proj": (f, h),
                        "mlp.down_proj": (h, f)}.items():
      tensors[f"model.layers.{i}.{name}.weight"] = draw(*shape)
    for name in ("input_layernorm", "post_attention_layernorm"):
      tensors[f"model.layers.{i}.{name}.weight"] = 1 + 0.1 * draw(h)
    if config["model_type"] == "qwen3":
      for name in ("q_norm", "k_norm"):
        tensors[f"model.layers.{i}.self_attn.{name}.weight"] = 1 + 0.1 * draw(d)
  path.mkdir(parents=True, exist_ok=True)
  save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, path / "model.safetensors")
  (path / "config.json").write_text(json.dumps(config))
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
  tokenizer = Tokenizer(models.BPE(vocab, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.save(str(path / "tokenizer.json"))
  return path


@pytest.fixture
def tiny(tmp_path):
  return write_model(tmp_path / "tiny")
