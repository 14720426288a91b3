"""Eviction decisions: their relaxation for training, and the schedules of a retrofit."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

LOGIT_SCALE = 100.0
LOGIT_OFFSET = 5.0


@dataclass(frozen=True)
class Relaxation:
  """How decision logits become biases: l' = (l + noise * Logistic(0, 1)) / tau, keep probability 1 - sigmoid(l')."""
  tau: float
  noise: torch.Tensor  # [] float32 amplitude; a tensor, so that a change does not recompile.


def far_bias(logits: torch.Tensor) -> torch.Tensor:
  """log(1 - sigmoid(l)) of the *next* token's logit: the bit of token t + 1 decides token t. [B,G,T] -> [B,G,T]."""
  return F.pad(F.logsigmoid(-logits)[..., 1:], (0, 1))


def hard_bias(logits: torch.Tensor) -> torch.Tensor:
  """Inference: -inf for a key whose next token says evict (logit > 0), else 0. The newest token counts as kept."""
  return F.pad(torch.where(logits > 0, float("-inf"), 0.0)[..., 1:], (0, 1))


def relax(logits: torch.Tensor, uniform: torch.Tensor, relaxation: Relaxation) -> torch.Tensor:
  """Noisy logits l' from raw ones; `uniform` in (0, 1), same shape."""
  noise = torch.log(uniform) - torch.log1p(-uniform)
  return (logits + relaxation.noise * noise) / relaxation.tau


def hard_rate(relaxed: torch.Tensor) -> torch.Tensor:
  """Mean of the hard decisions, with the gradient of the soft ones (straight-through)."""
  soft = torch.sigmoid(relaxed)
  return ((relaxed > 0).float() + soft - soft.detach()).mean()


@dataclass(frozen=True)
class Schedule:
  """Everything that changes over a run, as a function of progress in [0, 1]."""
  final_ratio: float          # tokens per kept token at the end: the evicted share rises to 1 - 1 / final_ratio
  ramp: float = 0.4           # share of the run over which the evicted share rises linearly
  decay_from: float = 0.4     # learning rate: constant, then linear to `floor` of itself
  floor: float = 0.02
  warmup: float = 0.01
  noise: float = 1.0          # amplitude of the logistic noise, until `anneal_from`, then linear to `noise_end`
  noise_end: float = 1.0
  anneal_from: float = 0.5

  def evicted(self, progress: float) -> float:
    return (1.0 - 1.0 / self.final_ratio) * min(progress / self.ramp, 1.0)

  def learning_rate(self, progress: float) -> float:
    """Factor on the configured learning rates."""
    if progress < self.warmup:
      return progress / self.warmup
    rest = max(progress - self.decay_from, 0.0) / (1.0 - self.decay_from)
    return 1.0 - (1.0 - self.floor) * rest

  def noise_amplitude(self, progress: float) -> float:
    rest = max(progress - self.anneal_from, 0.0) / (1.0 - self.anneal_from)
    return self.noise + (self.noise_end - self.noise) * rest
