"""Llama and Qwen3 decoders with DMS decision heads and, if asked for, an update of the weights.

The base weights stay as they are. Run with `gate=None` a model is its own teacher: no eviction, no update.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open

from winnow_training import attention
from winnow_training.gate import LOGIT_OFFSET, LOGIT_SCALE, Relaxation, far_bias, hard_bias, relax

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
MATRICES = PROJECTIONS + ("gate_proj", "up_proj", "down_proj")


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


def model_directory(path: Path) -> Path:
  """`path` itself, or for a GGUF file the directory beside it that scripts/convert_gguf.py makes of it (once)."""
  if path.suffix != ".gguf":
    return path
  directory = path.with_suffix("")
  if not directory.exists():
    script = Path(__file__).resolve().parents[2] / "scripts" / "convert_gguf.py"
    subprocess.run([sys.executable, str(script), str(path), str(directory)], check=True)
  return directory


@dataclass(frozen=True)
class Update:
  """What of a model is trained beside its gates."""
  rank: int = 0             # of a low-rank update of q, k, v and o; 0: none
  alpha: float = 0.0
  full: bool = False        # every matrix of every layer, float32 copies
  borrowed: bool = False    # the last channel of each group's first query head decides, instead of a head of its own


@dataclass
class Gate:
  """What a forward with eviction needs beside the tokens."""
  window: int
  relaxation: Relaxation | None = None            # None: hard decisions, as an engine takes them
  near_mask: attention.BlockMask | None = None    # given: attention by `compact`, else by `masked`
  shift: float = 0.0                              # added to every logit (a higher one evicts more)
  dense: bool = False                             # the trained update on, eviction off
  compiled: bool = False                          # hard decisions by `compact_compiled`: a GPU, T a multiple of BLOCK


class Layer(nn.Module):
  def __init__(self, config: ModelConfig, weights: dict[str, torch.Tensor], update: Update):
    super().__init__()
    self.config, self.borrowed = config, update.borrowed
    for name, weight in weights.items():
      self.register_buffer(name.replace(".", "_"), weight, persistent=False)
    if update.borrowed:
      self.borrow = nn.Parameter(torch.zeros(config.kv_heads, config.hidden))
    else:
      self.dms_norm = nn.Parameter(torch.ones(config.hidden))
      self.dms_proj = nn.Parameter(torch.zeros(config.kv_heads, config.hidden))
    self.lora = nn.ModuleDict({p: LowRank(*weights[p].shape, update.rank, update.alpha) for p in PROJECTIONS}
                              if update.rank else {})
    self.full = nn.ParameterDict({p: nn.Parameter(weights[p].float()) for p in MATRICES} if update.full else {})
    self.cache_dtype: torch.dtype | None = None

  @torch.no_grad()
  def merge(self) -> None:
    """Replaces the weights by the updated ones, rounded to BF16; the gate stays apart."""
    for name, update in self.lora.items():
      setattr(self, name, update.merged(getattr(self, name)))
    for name, weight in self.full.items():
      setattr(self, name, weight.to(torch.bfloat16).to(getattr(self, name).dtype))
    self.lora, self.full = nn.ModuleDict(), nn.ParameterDict()

  def decide(self, h: torch.Tensor) -> torch.Tensor:
    """Decision logits [B,G,T] float32 from the residual stream before the input norm."""
    normed = rms_norm(h.float(), self.dms_norm, self.config.eps)
    return (F.linear(normed, self.dms_proj) * LOGIT_SCALE - LOGIT_OFFSET).transpose(1, 2)

  def _project(self, x: torch.Tensor, name: str, update: bool) -> torch.Tensor:
    if update and name in self.full:
      return F.linear(x, self.full[name].to(x.dtype))
    y = F.linear(x, getattr(self, name))
    return y + self.lora[name](x) if update and name in self.lora else y

  def _lend(self, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """q [B,H,T,d] with its borrowed channels computed by the gate's own rows from x [B,T,hidden]."""
    own = F.linear(x, self.borrow.to(x.dtype)).transpose(1, 2)
    return torch.where(self._lent(q), own.repeat_interleave(q.shape[1] // own.shape[1], 1)[..., None], q)

  def _lent(self, q: torch.Tensor) -> torch.Tensor:
    """Mask [H,1,d] of the borrowed channels."""
    head, channel = torch.arange(q.shape[1], device=q.device), torch.arange(q.shape[3], device=q.device)
    first = head % (self.config.heads // self.config.kv_heads) == 0
    return first[:, None, None] & (channel == self.config.head_dim - 1)

  def forward(self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, gate: Gate | None,
              uniform: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Residual stream [B,T,hidden] in and out, and the decision logits (relaxed ones in training)."""
    c, (batch, length, _) = self.config, h.shape
    x = rms_norm(h, self.input_layernorm, c.eps)
    split = lambda y, n: y.view(batch, length, n, c.head_dim).transpose(1, 2)
    update = gate is not None
    borrowed = update and self.borrowed
    q = split(self._project(x, "q_proj", update), c.heads)
    k = split(self._project(x, "k_proj", update), c.kv_heads)
    v = split(self._project(x, "v_proj", update), c.kv_heads)
    if borrowed:
      q = self._lend(q, x)
    if c.qk_norm:
      q, k = rms_norm(q, self.q_norm, c.eps), rms_norm(k, self.k_norm, c.eps)
    if borrowed:
      borrowed_logits = q[:, ::c.heads // c.kv_heads, :, -1].bfloat16().float() * LOGIT_SCALE - LOGIT_OFFSET
      q = torch.where(self._lent(q), 0.0, q)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if borrowed:
      q = torch.where(self._lent(q), 0.0, q)    # The rotation wrote into it.
    if self.cache_dtype is not None:
      k, v = k.to(self.cache_dtype).to(q.dtype), v.to(self.cache_dtype).to(q.dtype)

    logits = None
    if gate is None or gate.dense:
      a = attention.causal(q, k, v)
    else:
      logits = (borrowed_logits if borrowed else self.decide(h)) + gate.shift
      if gate.relaxation is not None:
        logits = relax(logits, uniform, gate.relaxation)
        bias = far_bias(logits)
      else:
        bias = hard_bias(logits)
      if gate.near_mask is not None:
        a = attention.compact(q, k, v, bias, gate.window, gate.near_mask)
      elif gate.compiled:
        a = attention.compact_compiled(q, k, v, bias, gate.window)
      else:
        a = attention.masked(q, k, v, bias, gate.window)
    a = a.transpose(1, 2).reshape(batch, length, c.heads * c.head_dim)
    h = h + self._project(a, "o_proj", update)
    x = rms_norm(h, self.post_attention_layernorm, c.eps)
    inner = F.silu(self._project(x, "gate_proj", update)) * self._project(x, "up_proj", update)
    return h + self._project(inner, "down_proj", update), logits


def full_name(layer: int, name: str) -> str:
  """A matrix's name in a checkpoint."""
  return f"model.layers.{layer}.{'self_attn' if name in PROJECTIONS else 'mlp'}.{name}.weight"


class Model(nn.Module):
  """A decoder. Build one with `load`; `adapter_state` and `load_adapter` carry what is trained."""

  def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor], update: Update = Update()):
    super().__init__()
    self.config = config
    names = {f"self_attn.{p}.weight": p for p in PROJECTIONS}
    names |= {f"mlp.{p}.weight": p for p in ("gate_proj", "up_proj", "down_proj")}
    names |= {f"{p}.weight": p for p in ("input_layernorm", "post_attention_layernorm")}
    if config.qk_norm:
      names |= {f"self_attn.{p}.weight": p for p in ("q_norm", "k_norm")}
    self.layers = nn.ModuleList(
        Layer(config, {short: tensors[f"model.layers.{i}.{name}"] for name, short in names.items()}, update)
        for i in range(config.layers))
    self.register_buffer("embed", tensors["model.embed_tokens.weight"], persistent=False)
    self.register_buffer("norm", tensors["model.norm.weight"], persistent=False)
    head = self.embed if config.tied else tensors["lm_head.weight"]
    self.register_buffer("head", head, persistent=False)

  @staticmethod
  def load(path: Path, device: torch.device, dtype: torch.dtype, update: Update = Update()) -> "Model":
    """Reads a Hugging Face directory (config.json, *.safetensors); weights pass through BF16, then `dtype`."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
      with safe_open(file, "pt") as f:
        tensors |= {name: f.get_tensor(name).to(torch.bfloat16).to(dtype) for name in f.keys()}
    return Model(ModelConfig.from_dir(path), tensors, update).to(device)

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
      if layer.borrowed:
        state[prefix + "dms_borrowed.weight"] = layer.borrow
      else:
        state[prefix + "dms_proj_alpha.weight"] = layer.dms_proj
        state[prefix + "dms_proj_alpha_norm.weight"] = layer.dms_norm
      for name, update in layer.lora.items():
        state[f"{prefix}{name}.lora_A"] = update.A
        state[f"{prefix}{name}.lora_B"] = update.B
      for name, weight in layer.full.items():
        state[full_name(i, name)] = weight
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}

  @torch.no_grad()
  def load_adapter(self, state: dict[str, torch.Tensor], merge: bool) -> None:
    """Takes `adapter_state`'s tensors; `merge` puts the update into the weights as an engine does at load (and loses
    the original ones)."""
    for i, layer in enumerate(self.layers):
      prefix = f"model.layers.{i}.self_attn."
      if layer.borrowed:
        layer.borrow.copy_(state[prefix + "dms_borrowed.weight"])
      else:
        layer.dms_proj.copy_(state[prefix + "dms_proj_alpha.weight"])
        layer.dms_norm.copy_(state[prefix + "dms_proj_alpha_norm.weight"])
      for name, update in layer.lora.items():
        update.A.copy_(state[f"{prefix}{name}.lora_A"])
        update.B.copy_(state[f"{prefix}{name}.lora_B"])
      for name, weight in layer.full.items():
        weight.copy_(state[full_name(i, name)])
      if merge:
        layer.merge()
