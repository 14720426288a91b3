"""config.json and the tensors: names, shapes, row order, rope scaling."""

import math

import numpy as np

from .dequant import F32, to_float32
from .errors import ConversionError

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# GGUF name within "blk.N." -> Hugging Face name within "model.layers.N.".
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3_LAYER_TENSORS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

# Metadata that would change the computation, and the values that change nothing.
_NEUTRAL = {
    "expert_count": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "rope.scaling.type": ("none",),
}


class OutputTensor:
    """One tensor to write: its source, and the heads whose rows are to be reordered (0: none)."""

    __slots__ = ("name", "source", "permuted_heads")

    def __init__(self, name, source, permuted_heads=0):
        self.name = name
        self.source = source
        self.permuted_heads = permuted_heads


class HfModel:
    """What a Llama or Qwen3 GGUF file becomes: `config` (dict) and `tensors` (in file order)."""

    def __init__(self, gguf):
        self._gguf = gguf
        arch = self._get("general.architecture", str)
        if arch not in _ARCHITECTURES:
            known = " and ".join(_ARCHITECTURES)
            raise gguf.error(f"architecture '{arch}' is not converted, only {known}")
        self.arch = arch
        for key, neutral in _NEUTRAL.items():
            value = gguf.metadata.get(f"{arch}.{key}")
            if value is not None and value not in neutral:
                raise gguf.error(f"{arch}.{key} = {value} is not converted")
        self._read_shape()
        self.config = self._config()
        self.tensors = self._tensors()

    def _get(self, key, kind, default=None, low=1, high=1 << 31):
        value = self._gguf.metadata.get(key, default)
        if value is None:
            raise self._gguf.error(f"the metadata value '{key}' is missing")
        if kind is not str and isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # one value a layer, all equal
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._gguf.error(f"{key} is not the {kind.__name__} that it should be")
        if kind is not str and not low <= value <= high:
            raise self._gguf.error(f"{key} = {value} is outside [{low}, {high}]")
        return value

    def _read_shape(self):
        arch = self.arch
        self.layers = self._get(f"{arch}.block_count", int, high=4096)
        self.hidden = self._get(f"{arch}.embedding_length", int, high=1 << 20)
        self.intermediate = self._get(f"{arch}.feed_forward_length", int, high=1 << 24)
        self.heads = self._get(f"{arch}.attention.head_count", int, high=4096)
        self.kv_heads = self._get(f"{arch}.attention.head_count_kv", int, self.heads, high=4096)
        self.context = self._get(f"{arch}.context_length", int)
        if self.heads % self.kv_heads:
            raise self._gguf.error(f"{self.heads} heads are no multiple of {self.kv_heads} KV heads")
        key = f"{arch}.attention.key_length"
        if key not in self._gguf.metadata and self.hidden % self.heads:
            raise self._gguf.error(f"'{key}' is missing and {self.hidden} is no multiple of {self.heads} heads")
        self.head_dim = self._get(key, int, self.hidden // self.heads, high=4096)
        value_dim = self._get(f"{arch}.attention.value_length", int, self.head_dim)
        rope_dim = self._get(f"{arch}.rope.dimension_count", int, self.head_dim)
        if value_dim != self.head_dim:
            raise self._gguf.error(f"keys of {self.head_dim} and values of {value_dim} are not converted")
        if rope_dim != self.head_dim or self.head_dim % 2:
            raise self._gguf.error(f"rotation of {rope_dim} of {self.head_dim} dimensions is not converted")
        self.rope_theta = _shortest(self._get(f"{arch}.rope.freq_base", float, 10000.0, 1.0, 1e12))
        self.eps = _shortest(self._get(f"{arch}.attention.layer_norm_rms_epsilon", float, None, 0, 1))
        embedding = self._gguf.tensors.get("token_embd.weight")
        if embedding is None:
            raise self._gguf.error("tensor 'token_embd.weight' is missing")
        self.vocab = embedding.shape[0]

    def _config(self):
        metadata = self._gguf.metadata
        config = {
            "architectures": [_ARCHITECTURES[self.arch]],
            "model_type": self.arch,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": self._rope_scaling(),
            "max_position_embeddings": self.context,
            "vocab_size": self.vocab,
            "tie_word_embeddings": "output.weight" not in self._gguf.tensors,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }
        if self.arch == "llama":
            config["mlp_bias"] = False
        else:
            config["use_sliding_window"] = False
        for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
            token = metadata.get(f"tokenizer.ggml.{key}_token_id")
            if token is not None:
                config[f"{name}_token_id"] = token
        return config

    def _rope_scaling(self):
        tensor = self._gguf.tensors.get("rope_freqs.weight")
        if tensor is None:
            return None
        if tensor.shape != [self.head_dim // 2] or tensor.type != F32:
            raise self._gguf.error(f"tensor 'rope_freqs.weight' is not F32 [{self.head_dim // 2}]")
        factors = to_float32(self._gguf.read(tensor, 0, 1), F32)
        try:
            return recover_llama3_scaling(factors, self.rope_theta, self.head_dim)
        except ConversionError as e:
            raise self._gguf.error(f"tensor 'rope_freqs.weight': {e}") from e

    def _tensors(self):
        hidden, q_rows, kv_rows = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            "attn_norm": [hidden],
            "attn_q": [q_rows, hidden],
            "attn_k": [kv_rows, hidden],
            "attn_v": [kv_rows, hidden],
            "attn_output": [hidden, q_rows],
            "ffn_norm": [hidden],
            "ffn_gate": [self.intermediate, hidden],
            "ffn_up": [self.intermediate, hidden],
            "ffn_down": [hidden, self.intermediate],
            "attn_q_norm": [self.head_dim],
            "attn_k_norm": [self.head_dim],
        }
        names = dict(_LAYER_TENSORS)
        permuted = {}
        if self.arch == "llama":
            permuted = {"attn_q": self.heads, "attn_k": self.kv_heads}
        else:
            names.update(_QWEN3_LAYER_TENSORS)
        wanted = [("token_embd.weight", "model.embed_tokens.weight", [self.vocab, hidden], 0)]
        for layer in range(self.layers):
            for name, hf_name in names.items():
                hf_name = f"model.layers.{layer}.{hf_name}.weight"
                wanted.append((f"blk.{layer}.{name}.weight", hf_name, shapes[name], permuted.get(name, 0)))
        wanted.append(("output_norm.weight", "model.norm.weight", [hidden], 0))
        if not self.config["tie_word_embeddings"]:
            wanted.append(("output.weight", "lm_head.weight", [self.vocab, hidden], 0))
        tensors = []
        for name, hf_name, shape, heads in wanted:
            source = self._gguf.tensors.get(name)
            if source is None:
                raise self._gguf.error(f"tensor '{name}' is missing")
            if source.shape != shape:
                raise self._gguf.error(f"tensor '{name}' has the shape {source.shape}, not {shape}")
            tensors.append(OutputTensor(hf_name, source, heads))
        known = {name for name, _, _, _ in wanted} | {"rope_freqs.weight"}
        for name in self._gguf.tensors:
            if name not in known:
                raise self._gguf.error(f"tensor '{name}' has no place in a {self.arch} model")
        return tensors

    def chunks(self, tensor, max_values):
        """The float32 values of `tensor` in order, in pieces of whole rows near `max_values`."""
        source = tensor.source
        if len(source.shape) == 1:
            yield to_float32(self._gguf.read(source, 0, 1), source.type)
            return
        rows, columns = source.shape
        step = max(1, max_values // columns)
        if tensor.permuted_heads:
            step = max(1, step // self.head_dim) * self.head_dim
        for row in range(0, rows, step):
            count = min(step, rows - row)
            values = to_float32(self._gguf.read(source, row, count), source.type)
            if tensor.permuted_heads:
                values = unpermute(values.reshape(count, columns), count // self.head_dim)
            yield values.reshape(-1)


def _shortest(value):
    """A float32's value as the shortest decimal that names it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def unpermute(rows, heads):
    """Undoes llama.cpp's row order: pairs (2i, 2i + 1) of each head back to (i, i + dim / 2)."""
    head_dim = len(rows) // heads
    pairs = rows.reshape(heads, head_dim // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(len(rows), -1)


def llama3_factors(theta, head_dim, factor, low, high, original):
    """What rope_freqs.weight holds for a llama3 scaling: the divisor of each frequency."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


def recover_llama3_scaling(factors, theta, head_dim):
    """The llama3 rope_scaling that gives these factors, or None if they all are 1.

    The factors fix `factor`, and the other three up to a common scale (it cancels out): the
    scale is chosen so that low_freq_factor is 1, as in every published model.
    """
    if not np.all(np.isfinite(factors)) or np.any(factors <= 0):
        raise ConversionError("a factor is not a positive number")
    if np.all(factors == 1):
        return None
    factor = _shortest(factors.max())
    candidates = [(1.0, 4.0, 8192)]
    # Between the bounds 1 / f is linear in 1 / wavelength; two such points give both bounds.
    inside = np.flatnonzero((factors > 1) & (factors < factors.max()))
    if len(inside) >= 2:
        inverse = 1 / (2 * math.pi * theta ** (2 * inside / head_dim))
        smooth = (1 / factors[inside].astype(np.float64) - 1 / factor) / (1 - 1 / factor)
        slope, intercept = np.polyfit(inverse, smooth, 1)
        if intercept < 0 < slope:
            high = 1 - 1 / intercept
            original = slope * (high - 1)
            candidates.append((1.0, float(f"{high:.3g}"), round(original)))
            candidates.append((1.0, high, round(original)))
    for low, high, original in candidates:
        if np.allclose(llama3_factors(theta, head_dim, factor, low, high, original), factors, rtol=2e-6, atol=0):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise ConversionError("no llama3 rope scaling gives these factors")
