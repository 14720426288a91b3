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
  tau: float = 0.1
  rate_weight: float = 1.0
  lora_rank: int = 8              # 0: decision heads alone, the base untouched
  lora_alpha: float = 16.0
  lr_heads: float = 1e-4
  lr_lora: float = 4e-4
  clip: float = 1.0
  offset: float = LOGIT_OFFSET    # written into the metadata; above the trained offset it keeps more tokens
  seed: int = 1
  checkpoint_s: float = 60.0


def _build(cls, values: dict, where: str):
  known = {f.name for f in dataclasses.fields(cls)}
  if unknown := set(values) - known:
    raise ValueError(f"{where}: unknown keys {sorted(unknown)}")
  return cls(**values)


def load_config(path: Path, **overrides) -> TrainConfig:
  """Reads `path`; `overrides` that are not None replace top-level keys."""
  values = tomllib.loads(path.read_text())
  values["schedule"] = _build(Schedule, values["schedule"], f"{path}: [schedule]")
  values["sources"] = tuple(_build(SourceConfig, s, f"{path}: [[sources]]") for s in values["sources"])
  return _build(TrainConfig, values | {k: v for k, v in overrides.items() if v is not None}, str(path))
