"""A training run's configuration: one TOML file a model (configs/*.toml)."""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path

from winnow_training.gate import LOGIT_OFFSET, Schedule


@dataclass(frozen=True)
class SourceConfig:
  path: str       # token file, text file or folder, relative to --data
  weight: float   # share of the sequences


@dataclass(frozen=True)
class TrainConfig:
  base: str                       # name that goes into the metadata
  steps: int
  schedule: Schedule
  sources: tuple[SourceConfig, ...]
  window: int = 512
  length: int = 8192              # tokens a sequence, one sequence a step and GPU
  accumulate: int = 1             # sequences a step
  recall: float = 0.2             # share of the sequences with planted facts
  recall_weight: float = 1.0      # weight of the answers' tokens in the loss
  dense: float = 0.0              # share of the sequences with eviction off: keeps the update near the identity there
  hard_labels: float = 0.0        # share of the text's own next token in what the student is taught
  tau: float = 0.1
  rate_weight: float = 1.0
  gate: str = "heads"             # "heads": dms_proj_alpha on the residual stream; "borrowed": a query channel decides
  tune: str = "lora"              # "heads": the base untouched; "lora": a low-rank update; "full": all layer weights
  lora_rank: int = 8
  lora_alpha: float = 16.0
  lr_heads: float = 1e-4
  lr_lora: float = 4e-4
  lr_full: float = 4e-5
  decay_lora: float = 0.0         # AdamW's weight decay of the low-rank factors
  clip: float = 1.0
  offset: float = LOGIT_OFFSET    # written into the metadata; above the trained offset it keeps more tokens
  seed: int = 1
  checkpoint_s: float = 60.0

  def __post_init__(self) -> None:
    for name, known in {"gate": ("heads", "borrowed"), "tune": ("heads", "lora", "full")}.items():
      if getattr(self, name) not in known:
        raise ValueError(f"{name}: {getattr(self, name)!r}; one of {', '.join(known)}")
    if self.gate == "borrowed" and self.tune == "heads":
      raise ValueError("gate: a borrowed channel changes the model, so tune must be lora or full")
    for name in ("recall", "dense", "hard_labels"):
      if not 0.0 <= getattr(self, name) < 1.0:
        raise ValueError(f"{name}: {getattr(self, name)}; a share in [0, 1)")

  @property
  def rank(self) -> int:
    """Rank of the low-rank update; 0 without one."""
    return self.lora_rank if self.tune == "lora" else 0


def _build(cls, values: dict, where: str):
  known = {f.name for f in dataclasses.fields(cls)}
  if unknown := set(values) - known:
    raise ValueError(f"{where}: unknown keys {sorted(unknown)}")
  return cls(**values)


def load_config(path: Path, changes: list[str] = (), **overrides) -> TrainConfig:
  """Reads `path`. `changes` are `key=value` lines of TOML, dotted for a table (`schedule.final_ratio=9`);
  `overrides` that are not None replace top-level keys."""
  values = tomllib.loads(path.read_text())
  for change in changes:
    for key, value in tomllib.loads(change).items():
      values[key] = values[key] | value if isinstance(value, dict) else value
  values["schedule"] = _build(Schedule, values["schedule"], f"{path}: [schedule]")
  values["sources"] = tuple(_build(SourceConfig, s, f"{path}: [[sources]]") for s in values["sources"])
  return _build(TrainConfig, values | {k: v for k, v in overrides.items() if v is not None}, str(path))
