"""What a run leaves: `dms_adapter.safetensors` and `dms_metadata.json` (README.md, "Adapter format"), or, where it
changed more than an adapter holds, a whole checkpoint."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from winnow_training.gate import LOGIT_OFFSET, LOGIT_SCALE
from winnow_training.model import MATRICES, Model, Update, full_name

ADAPTER, METADATA = "dms_adapter.safetensors", "dms_metadata.json"


def adapter_metadata(base: str, window: int, ratio: float, update: Update, offset: float = LOGIT_OFFSET) -> dict:
  """`ratio` is the compression that the training aimed at, tokens per kept token without the window. `offset` above
  the trained LOGIT_OFFSET keeps more tokens: an engine evicts where `w . n h / rms(h) * 100 > offset`.
  """
  metadata = {
      "dms_window_size": window,
      "dms_alpha_scale": LOGIT_SCALE,
      "dms_initial_alpha_offset": offset,
      "dms_separate_alpha": not update.borrowed,
      "dms_alpha_per": "head",
      "dms_decision_shift": 1,
      "dms_cr": ratio,
      "base": base,
  }
  if update.borrowed:
    metadata["dms_zero_channel"] = "both"
  if update.rank and not update.borrowed:
    metadata |= {"lora_rank": update.rank, "lora_alpha": update.alpha}
  return metadata


def save_adapter(path: Path, state: dict[str, torch.Tensor], metadata: dict) -> None:
  """Heads in float32, low-rank factors in BF16 (the precision that the training's forward ran them in)."""
  path.mkdir(parents=True, exist_ok=True)
  save_file({n: t.to(torch.bfloat16) if ".lora_" in n else t for n, t in state.items()}, path / ADAPTER)
  (path / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")


def save_checkpoint(path: Path, source: Path, model: Model, metadata: dict) -> None:
  """A whole Hugging Face directory: `source`'s files, its weights updated by `model` (which is merged by this).

  A borrowed gate goes into the rows of q_proj that it borrows; heads stay tensors of their own (`dms_proj_alpha`).
  """
  path.mkdir(parents=True, exist_ok=True)
  for file in source.iterdir():
    if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json") and file.name != "conversion.json":
      (path / file.name).write_bytes(file.read_bytes())
  tensors = {}
  for file in sorted(source.glob("*.safetensors")):
    tensors |= load_file(file)
  c = model.config
  for i, layer in enumerate(model.layers):
    layer.merge()
    for name in MATRICES:
      tensors[full_name(i, name)] = getattr(layer, name).detach().to("cpu", torch.bfloat16).contiguous().clone()
    prefix = f"model.layers.{i}.self_attn."
    if layer.borrowed:
      rows = torch.arange(c.kv_heads) * (c.heads // c.kv_heads) * c.head_dim + c.head_dim - 1
      tensors[prefix + "q_proj.weight"][rows] = layer.borrow.detach().to("cpu", torch.bfloat16)
    else:
      tensors[prefix + "dms_proj_alpha.weight"] = layer.dms_proj.detach().float().cpu().clone()
      tensors[prefix + "dms_proj_alpha_norm.weight"] = layer.dms_norm.detach().float().cpu().clone()
  save_file(tensors, path / "model.safetensors", {"format": "pt"})
  (path / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")


def read_adapter(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
  """Tensors and metadata of an adapter folder."""
  metadata = json.loads((path / METADATA).read_text())
  for key, value in {"dms_alpha_scale": LOGIT_SCALE, "dms_decision_shift": 1, "dms_alpha_per": "head"}.items():
    if metadata[key] != value:
      raise ValueError(f"{path / METADATA}: {key} is {metadata[key]!r}; only {value!r} is supported")
  return load_file(path / ADAPTER), metadata


def load_student(base: Path, path: Path, device: torch.device, dtype: torch.dtype) -> tuple[Model, dict]:
  """The model that an engine runs with the adapter or checkpoint in `path`, its update merged, and its metadata."""
  if (path / ADAPTER).exists():
    state, metadata = read_adapter(path)
    student = Model.load(base, device, dtype, Update(metadata.get("lora_rank", 0), metadata.get("lora_alpha", 0.0)))
    student.load_adapter(state, merge=True)
    return student, metadata
  metadata = json.loads((path / METADATA).read_text())
  student = Model.load(path, device, dtype, Update(borrowed=not metadata["dms_separate_alpha"]))
  c, state = student.config, {}
  for file in sorted(path.glob("*.safetensors")):
    state |= {n: t for n, t in load_file(file).items() if ".dms_" in n}
  for i, layer in enumerate(student.layers):
    if layer.borrowed:
      first = torch.arange(c.kv_heads, device=device) * (c.heads // c.kv_heads) * c.head_dim
      state[f"model.layers.{i}.self_attn.dms_borrowed.weight"] = layer.q_proj[first + c.head_dim - 1]
  student.load_adapter(state, merge=False)
  return student, metadata
