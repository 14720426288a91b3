"""Llama and Qwen3 decoders with DMS decision heads and a low-rank update of the attention weights.

The base weights are frozen. Run with `gate=None` a model is its own teacher: no eviction, no update.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from winnow_training import attention
from winnow_training.gate import LOGIT_OFFSET, LOGIT_SCALE, Relaxation, far_bias, hard_bias, relax

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class ModelConfig:
  layers: int
  hidden: int
  intermediate: int
  heads: int
  kv_heads: int
  head_dim: int
  vocab: int
  rope_theta: float
  rope_scaling: dict | None
  eps: float
  tied: bool
  qk_norm: bool

  @staticmethod
  def from_dir(path: Path) -> "ModelConfig":
    raw = json.loads((path / "config.json").read_text())
    if raw["model_type"] not in ("llama", "qwen3"):
      raise ValueError(f"{path}/config.json: model_type {raw['model_type']!r}; llama and qwen3 are supported")
    if raw.get("attention_bias") or raw.get("mlp_bias"):
      raise ValueError(f"{path}/config.json: attention_bias and mlp_bias are not supported")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    scaling = rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None
    if scaling and scaling.get("rope_type", scaling.get("type")) != "llama3":
      raise ValueError(f"{path}/config.json: rope scaling {scaling}; only llama3 is supported")
    heads = raw["num_attention_heads"]
    return ModelConfig(layers=raw["num_hidden_layers"], hidden=raw["hidden_size"],
                       intermediate=raw["intermediate_size"], heads=heads,
                       kv_heads=raw.get("num_key_value_heads", heads),
                       head_dim=raw.get("head_dim") or raw["hidden_size"] // heads, vocab=raw["vocab_size"],
                       rope_theta=rope.get("rope_theta") or raw.get("rope_theta", 10000.0), rope_scaling=scaling,
                       eps=raw["rms_norm_eps"], tied=raw.get("tie_word_embeddings", False),
                       qk_norm=raw["model_type"] == "qwen3")


def rope_table(config: ModelConfig, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
  """cos and sin, [T, head_dim] float32, in the rotate-half layout."""
  half = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
  frequency = 1.0 / config.rope_theta ** half
  if (s := config.rope_scaling) is not None:
    original, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    turns = original * frequency / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    frequency = frequency * (smooth + (1 - smooth) / s["factor"])
  angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
  angle = torch.cat([angle, angle], -1)
  return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
  """RoPE on [B,heads,T,d], in float32; returns x's dtype."""
  first, second = x.float().chunk(2, -1)
  return (x.float() * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
  wide = x.float()
  return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


class LowRank(nn.Module):
  """A trained update of one weight: W + alpha / rank * B A, float32 factors, B zero at the start."""

  def __init__(self, outputs: int, inputs: int, rank: int, alpha: float):
    super().__init__()
    self.A = nn.Parameter(torch.randn(rank, inputs) * inputs ** -0.5)
    self.B = nn.Parameter(torch.zeros(outputs, rank))
    self.scale = alpha / rank

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, self.A.to(x.dtype)), (self.B * self.scale).to(x.dtype))

  def merged(self, weight: torch.Tensor) -> torch.Tensor:
    """The weight an engine runs: the sum, in float32, rounded to BF16, then to `weight`'s dtype."""
    return (weight.float() + self.scale * self.B @ self.A).to(torch.bfloat16).to(weight.dtype)


@dataclass
class Gate:
  """What a forward with eviction needs beside the tokens."""
  window: int
  relaxation: Relaxation | None = None            # None: hard decisions, as an engine takes them
  near_mask: attention.BlockMask | None = None    # given: attention by `compact`, else by `masked`
  shift: float = 0.0                              # added to every logit (a higher one evicts more)
  dense: bool = False                             # low-rank update on, eviction off


class Layer(nn.Module):
  def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor], rank: int, alpha: float):
    super().__init__()
    self.config = config
    for name, weight in weights.items():
      self.register_buffer(name.replace(".", "_"), weight, persistent=False)
    self.dms_norm = nn.Parameter(torch.ones(config.hidden))
    self.dms_proj = nn.Parameter(torch.zeros(config.kv_heads, config.hidden))
    shapes = {p: weights[p].shape for p in PROJECTIONS}
    self.lora = nn.ModuleDict({p: LowRank(*s, rank, alpha) for p, s in shapes.items()} if rank else {})
    self.cache_dtype: torch.dtype | None = None

  def decide(self, h: torch.Tensor) -> torch.Tensor:
    """Decision logits [B,G,T] float32 from the residual stream before the input norm."""
    normed = rms_norm(h.float(), self.dms_norm, self.config.eps)
    return (F.linear(normed, self.dms_proj) * LOGIT_SCALE - LOGIT_OFFSET).transpose(1, 2)

  def _project(self, x: torch.Tensor, name: str, update: bool) -> torch.Tensor:
    y = F.linear(x, getattr(self, name))
    return y + self.lora[name](x) if update and len(self.lora) else y

  def forward(self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, gate: Gate | None,
              uniform: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Residual stream [B,T,hidden] in and out, and the decision logits (relaxed ones in training)."""
    c, (batch, length, _) = self.config, h.shape
    x = rms_norm(h, self.input_layernorm, c.eps)
    split = lambda y, n: y.view(batch, length, n, c.head_dim).transpose(1, 2)
    update = gate is not None
    q = split(self._project(x, "q_proj", update), c.heads)
    k = split(self._project(x, "k_proj", update), c.kv_heads)
    v = split(self._project(x, "v_proj", update), c.kv_heads)
    if c.qk_norm:
      q, k = rms_norm(q, self.q_norm, c.eps), rms_norm(k, self.k_norm, c.eps)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if self.cache_dtype is not None:
      k, v = k.to(self.cache_dtype).to(q.dtype), v.to(self.cache_dtype).to(q.dtype)

    logits = None
    if gate is None or gate.dense:
      a = attention.causal(q, k, v)
    else:
      logits = self.decide(h) + gate.shift
      if gate.relaxation is not None:
        logits = relax(logits, uniform, gate.relaxation)
        bias = far_bias(logits)
      else:
        bias = hard_bias(logits)
      if gate.near_mask is not None:
        a = attention.compact(q, k, v, bias, gate.window, gate.near_mask)
      else:
        a = attention.masked(q, k, v, bias, gate.window)
    a = a.transpose(1, 2).reshape(batch, length, c.heads * c.head_dim)
    h = h + self._project(a, "o_proj", update)
    x = rms_norm(h, self.post_attention_layernorm, c.eps)
    return h + F.linear(F.silu(F.linear(x, self.gate_proj)) * F.linear(x, self.up_proj), self.down_proj), logits


class Model(nn.Module):
  """A decoder. Build one with `load`; `adapter_state` and `load_adapter` carry what is trained."""

  def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor], rank: int = 0, alpha: float = 0.0):
    super().__init__()
    self.config, self.rank, self.alpha = config, rank, alpha
    names = {f"self_attn.{p}.weight": p for p in PROJECTIONS}
    names |= {f"mlp.{p}.weight": p for p in ("gate_proj", "up_proj", "down_proj")}
    names |= {f"{p}.weight": p for p in ("input_layernorm", "post_attention_layernorm")}
    if config.qk_norm:
      names |= {f"self_attn.{p}.weight": p for p in ("q_norm", "k_norm")}
    self.layers = nn.ModuleList(
        Layer(config, {short: tensors[f"model.layers.{i}.{name}"] for name, short in names.items()}, rank, alpha)
        for i in range(config.layers))
    self.register_buffer("embed", tensors["model.embed_tokens.weight"], persistent=False)
    self.register_buffer("norm", tensors["model.norm.weight"], persistent=False)
    head = self.embed if config.tied else tensors["lm_head.weight"]
    self.register_buffer("head", head, persistent=False)

  @staticmethod
  def load(path: Path, device: torch.device, dtype: torch.dtype, rank: int = 0, alpha: float = 0.0) -> "Model":
    """Reads a Hugging Face directory (config.json, *.safetensors); weights pass through BF16, then `dtype`."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
      with safe_open(file, "pt") as f:
        tensors |= {name: f.get_tensor(name).to(torch.bfloat16).to(dtype) for name in f.keys()}
    return Model(ModelConfig.from_dir(path), tensors, rank, alpha).to(device)

  def set_cache_dtype(self, dtype: torch.dtype | None) -> None:
    """Rounds K (after RoPE) and V to `dtype` before every attention, as a cache of that type does."""
    for layer in self.layers:
      layer.cache_dtype = dtype

  def compile_layers(self) -> None:
    for layer in self.layers:
      layer.compile()

  def forward(self, tokens: torch.Tensor, gate: Gate | None = None, uniform: torch.Tensor | None = None
              ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens [B,T]; `uniform` [L,B,G,T] in (0, 1) draws the noise of a relaxed gate.

    Returns the normed last hidden state [B,T,hidden] and the decision logits [L,B,G,T], if there are any.
    """
    h = F.embedding(tokens, self.embed)
    cos, sin = rope_table(self.config, tokens.shape[1], tokens.device)
    decisions = []
    for i, layer in enumerate(self.layers):
      h, logits = layer(h, cos, sin, gate, None if uniform is None else uniform[i])
      decisions.append(logits)
    hidden = rms_norm(h, self.norm, self.config.eps)
    return hidden, None if decisions[0] is None else torch.stack(decisions)

  def adapter_state(self) -> dict[str, torch.Tensor]:
    """Trained tensors under their exported names, float32 on the CPU."""
    state = {}
    for i, layer in enumerate(self.layers):
      prefix = f"model.layers.{i}.self_attn."
      state[prefix + "dms_proj_alpha.weight"] = layer.dms_proj
      state[prefix + "dms_proj_alpha_norm.weight"] = layer.dms_norm
      for name, update in layer.lora.items():
        state[f"{prefix}{name}.lora_A"] = update.A
        state[f"{prefix}{name}.lora_B"] = update.B
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}

  @torch.no_grad()
  def load_adapter(self, state: dict[str, torch.Tensor], merge: bool) -> None:
    """Takes `adapter_state`'s tensors; `merge` adds the low-rank update to the weights as an engine does at load."""
    for i, layer in enumerate(self.layers):
      prefix = f"model.layers.{i}.self_attn."
      layer.dms_proj.copy_(state[prefix + "dms_proj_alpha.weight"])
      layer.dms_norm.copy_(state[prefix + "dms_proj_alpha_norm.weight"])
      for name, update in layer.lora.items():
        update.A.copy_(state[f"{prefix}{name}.lora_A"])
        update.B.copy_(state[f"{prefix}{name}.lora_B"])
        if merge:
          setattr(layer, name, update.merged(getattr(layer, name)))
      if merge:
        layer.lora = nn.ModuleDict()
