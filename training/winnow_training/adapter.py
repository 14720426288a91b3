"""The adapter on disk: `dms_adapter.safetensors` and `dms_metadata.json` (README.md, "Adapter format")."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from winnow_training.gate import LOGIT_OFFSET, LOGIT_SCALE

ADAPTER, METADATA = "dms_adapter.safetensors", "dms_metadata.json"


def save_adapter(path: Path, state: dict[str, torch.Tensor], base: str, window: int, ratio: float, rank: int,
                 alpha: float, offset: float = LOGIT_OFFSET) -> None:
  """Heads in float32, low-rank factors in BF16 (the precision that the training's forward ran them in).

  `ratio` is the compression that the training aimed at, tokens per kept token without the window. `offset` above
  the trained LOGIT_OFFSET keeps more tokens: an engine evicts where `w . n h / rms(h) * 100 > offset`.
  """
  path.mkdir(parents=True, exist_ok=True)
  save_file({n: t.to(torch.bfloat16) if ".lora_" in n else t for n, t in state.items()}, path / ADAPTER)
  metadata = {
      "dms_window_size": window,
      "dms_alpha_scale": LOGIT_SCALE,
      "dms_initial_alpha_offset": offset,
      "dms_separate_alpha": True,
      "dms_alpha_per": "head",
      "dms_decision_shift": 1,
      "dms_cr": ratio,
      "base": base,
  }
  if rank:
    metadata |= {"lora_rank": rank, "lora_alpha": alpha}
  (path / METADATA).write_text(json.dumps(metadata, indent=1) + "\n")


def read_adapter(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
  """Tensors and metadata of an adapter folder."""
  metadata = json.loads((path / METADATA).read_text())
  for key, value in {"dms_alpha_scale": LOGIT_SCALE, "dms_decision_shift": 1, "dms_alpha_per": "head"}.items():
    if metadata[key] != value:
      raise ValueError(f"{path / METADATA}: {key} is {metadata[key]!r}; only {value!r} is supported")
  return load_file(path / ADAPTER), metadata
