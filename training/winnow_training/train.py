"""Retrofits DMS onto a model: `python -m winnow_training.train --config C --model DIR --data DIR --out DIR`.

Teacher: the base model. Student: the same weights with eviction and, if configured, a low-rank update. Loss: forward
KL per token plus a one-sided penalty on the evicted share. A run is exact to the step: killed or stopped
(`--stop-after`), the same command goes on from the last checkpoint.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from winnow_training.adapter import adapter_metadata, save_adapter, save_checkpoint
from winnow_training.attention import window_mask
from winnow_training.config import TrainConfig, load_config
from winnow_training.data import SequenceStream, Source, read_tokens
from winnow_training.gate import Relaxation, hard_rate
from winnow_training.loss import forward_kl
from winnow_training.model import Gate, Model, Update, model_directory

CHECKPOINT = "checkpoint.pt"


class Trainer:
  """One run: model, optimizer and position. Not thread-safe.

  On a GPU the forward and backward of one sequence are captured once as a CUDA graph; what changes from step to step
  (tokens, noise, targets) goes through fixed tensors.
  """

  def __init__(self, config: TrainConfig, model: Model, stream: SequenceStream, device: torch.device):
    self.config, self.model, self.stream, self.device = config, model, stream, device
    self.step = 0
    kind = lambda name: "lora" if ".lora." in name else "full" if ".full." in name else "gate"
    named = list(model.named_parameters())
    groups = [{"params": [p for n, p in named if kind(n) == k], "base_lr": rate, "weight_decay": decay}
              for k, rate, decay in (("gate", config.lr_heads, 0.0), ("lora", config.lr_lora, config.decay_lora),
                                     ("full", config.lr_full, 0.0))]
    self._optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.95),
                                        fused=device.type == "cuda")
    self._parameters = [p for _, p in named]
    self._tokens = torch.zeros(1, config.length, dtype=torch.int64, device=device)
    self._labels = torch.zeros(config.length, dtype=torch.int64, device=device)
    self._weights = torch.ones(config.length, device=device)
    self._uniform = torch.full((model.config.layers, 1, model.config.kv_heads, config.length), 0.5, device=device)
    self._noise, self._target = torch.zeros((), device=device), torch.zeros((), device=device)
    near = window_mask(config.length, config.window, device) if device.type == "cuda" else None
    self._gates = {False: Gate(config.window, Relaxation(config.tau, self._noise), near),
                   True: Gate(config.window, dense=True)}
    self._graphs: dict[bool, tuple[torch.cuda.CUDAGraph, list, tuple]] = {}
    if device.type == "cuda":
      model.compile_layers()

  def _forward_backward(self, dense: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and hard rate of the current tokens; leaves the gradient in the parameters."""
    with torch.no_grad():
      teacher, _ = self.model(self._tokens)
    student, relaxed = self.model(self._tokens, self._gates[dense], None if dense else self._uniform)
    kl = forward_kl(student[0], teacher[0], self.model.head, self._weights, self._labels, self.config.hard_labels)
    if dense:
      kl.backward()
      return kl.detach(), torch.zeros_like(kl)
    rate = hard_rate(relaxed)
    (kl + self.config.rate_weight * torch.relu(self._target - rate)).backward()
    return kl.detach(), rate.detach()

  def _clear(self) -> None:
    for parameter in self._parameters:
      parameter.grad = None

  def _capture(self, dense: bool) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
      for _ in range(3):    # Compiles, and lets the allocator settle.
        self._clear()
        self._forward_backward(dense)
    torch.cuda.current_stream().wait_stream(side)
    self._clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      outputs = self._forward_backward(dense)
    self._graphs[dense] = graph, [p.grad for p in self._parameters], outputs

  def is_dense(self, index: int) -> bool:
    """Whether sequence `index` is trained with eviction off."""
    return random.Random(f"dense/{self.config.seed}/{index}").random() < self.config.dense

  def _load(self, index: int) -> None:
    """Puts sequence `index`, its weights and its noise into the fixed tensors."""
    tokens, answers = self.stream[index]
    on_device = lambda x, to: to.copy_(x.pin_memory() if self.device.type == "cuda" else x, non_blocking=True)
    on_device(torch.from_numpy(tokens), self._tokens[0])
    on_device(torch.from_numpy(np.append(tokens[1:], -1)), self._labels)
    weights = 1.0 + (self.config.recall_weight - 1.0) * answers.astype(np.float32)
    on_device(torch.from_numpy(weights.astype(np.float32)), self._weights)
    generator = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + index)
    self._uniform.uniform_(1e-6, 1.0 - 1e-6, generator=generator)

  def _sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient and figures of sequence `index`, which with the seed fixes its tokens and noise."""
    dense = self.is_dense(index)
    self._load(index)
    if self.device.type != "cuda":
      self._clear()
      return self._forward_backward(dense)
    if dense not in self._graphs:
      self._capture(dense)
    graph, gradients, outputs = self._graphs[dense]
    for parameter, gradient in zip(self._parameters, gradients):
      parameter.grad = gradient
    graph.replay()    # Overwrites the gradients.
    return outputs

  def run_step(self) -> dict[str, torch.Tensor | float]:
    """One optimizer step; returns its figures (tensors stay on the device)."""
    c, progress = self.config, self.step / self.config.steps
    target, factor = c.schedule.evicted(progress), c.schedule.learning_rate(progress)
    self._noise.fill_(c.schedule.noise_amplitude(progress))
    self._target.fill_(target)
    for group in self._optimizer.param_groups:
      group["lr"] = group["base_lr"] * factor
    sums = {"kl": 0.0, "rate": 0.0, "kl_dense": 0.0}
    counts = {"kl": 0, "kl_dense": 0}
    gradients: list[torch.Tensor | None] = []
    for i in range(c.accumulate):
      index = self.step * c.accumulate + i
      kl, rate = self._sequence(index)
      name = "kl_dense" if self.is_dense(index) else "kl"
      sums[name], sums["rate"], counts[name] = sums[name] + kl, sums["rate"] + rate, counts[name] + 1
      if c.accumulate > 1:
        parts = [None if p.grad is None else p.grad / c.accumulate for p in self._parameters]
        gradients = [b if a is None else a if b is None else a + b for a, b in zip(gradients, parts)] if i else parts
    if gradients:
      for parameter, gradient in zip(self._parameters, gradients):
        parameter.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(self._parameters, c.clip)
    self._optimizer.step()
    self.step += 1
    out = {"target": target, "lr": factor, "noise": c.schedule.noise_amplitude(progress), "grad": norm}
    if counts["kl"]:
      out |= {"kl": sums["kl"] / counts["kl"], "rate": sums["rate"] / counts["kl"]}
    if counts["kl_dense"]:
      out["kl_dense"] = sums["kl_dense"] / counts["kl_dense"]
    return out

  def save(self, path: Path) -> None:
    """Writes a checkpoint; a crash while it is written leaves the previous one."""
    state = {"step": self.step, "config": dataclasses.asdict(self.config), "model": self.model.adapter_state(),
             "optimizer": self._optimizer.state_dict()}
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)

  def restore(self, path: Path) -> None:
    state = torch.load(path, map_location=self.device, weights_only=True)
    if state["config"] != dataclasses.asdict(self.config):
      raise ValueError(f"{path} belongs to another configuration; give a fresh --out")
    self.step = state["step"]
    self.model.load_adapter(state["model"], merge=False)
    self._optimizer.load_state_dict(state["optimizer"])


def build_stream(config: TrainConfig, data: Path, tokenizer: Tokenizer) -> SequenceStream:
  sources = [Source(read_tokens(data / s.path, tokenizer), s.weight) for s in config.sources]
  return SequenceStream(sources, tokenizer, config.length, config.recall, config.seed)


def train(trainer: Trainer, out: Path, stop_after: float | None, log_every: int) -> bool:
  """Runs to the end (True) or until `stop_after` seconds have passed (False). Logs a JSON line every few steps, of
  means since the last."""
  started = last_save = mark = time.monotonic()
  config, marked = trainer.config, trainer.step
  recent: dict[str, list] = {}
  with open(out / "train.log.jsonl", "a") as log:
    while trainer.step < config.steps:
      for key, value in trainer.run_step().items():
        recent.setdefault(key, []).append(value.clone() if isinstance(value, torch.Tensor) else value)
      if trainer.step % log_every == 0 or trainer.step == config.steps:
        figures = {k: round(sum(map(float, v)) / len(v), 5) for k, v in recent.items()}
        recent.clear()
        now = time.monotonic()
        speed = (trainer.step - marked) * config.accumulate * config.length / (now - mark)
        mark, marked = now, trainer.step
        log.write(json.dumps({"step": trainer.step} | figures | {"tokens_s": round(speed)}) + "\n")
        log.flush()
        shown = {k: f"{figures[k]:.4f}" for k in ("kl", "kl_dense", "rate", "target", "lr") if k in figures}
        print(f"{trainer.step:5}/{config.steps}  " + "  ".join(f"{k} {v}" for k, v in shown.items()) +
              f"  {speed / 1000:.1f}k tokens/s", flush=True)
        if not all(v < 1e3 for k, v in figures.items() if k.startswith("kl")):
          raise RuntimeError(f"diverged at step {trainer.step}: {figures}")
      now = time.monotonic()
      if now - last_save > config.checkpoint_s:
        trainer.save(out / CHECKPOINT)
        last_save = now
      if stop_after is not None and now - started > stop_after:
        trainer.save(out / CHECKPOINT)
        return False
  trainer.save(out / CHECKPOINT)
  return True


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", type=Path, required=True)
  parser.add_argument("--model", type=Path, required=True, help="the base: a Hugging Face directory or a GGUF file")
  parser.add_argument("--data", type=Path, required=True, help="folder that the config's sources are relative to")
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="instead of the config's, as TOML")
  parser.add_argument("--steps", type=int, help="instead of the config's")
  parser.add_argument("--seed", type=int, help="instead of the config's")
  parser.add_argument("--stop-after", type=float, help="seconds; checkpoint and leave, to be resumed")
  parser.add_argument("--log-every", type=int, default=20)
  parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
  args = parser.parse_args()

  torch._dynamo.config.recompile_limit = 64
  device = torch.device(args.device)
  config = load_config(args.config, args.set, steps=args.steps, seed=args.seed)
  torch.manual_seed(config.seed)
  source = model_directory(args.model)
  update = Update(config.rank, config.lora_alpha, config.tune == "full", config.gate == "borrowed")
  model = Model.load(source, device, torch.bfloat16, update)
  stream = build_stream(config, args.data, Tokenizer.from_file(str(source / "tokenizer.json")))
  trainer = Trainer(config, model, stream, device)
  args.out.mkdir(parents=True, exist_ok=True)
  if (args.out / CHECKPOINT).exists():
    trainer.restore(args.out / CHECKPOINT)
    print(f"resumed at step {trainer.step}")
  else:
    shutil.copy(args.config, args.out / "config.toml")
    if args.set:
      with open(args.out / "config.toml", "a") as file:
        file.write("\n# Changed on the command line: " + ", ".join(args.set) + "\n")
  if not train(trainer, args.out, args.stop_after, args.log_every):
    print(f"paused at step {trainer.step} of {config.steps}: run the same command to go on")
    return
  metadata = adapter_metadata(config.base, config.window, config.schedule.final_ratio, update, config.offset)
  if update.full or update.borrowed:
    save_checkpoint(args.out, source, model, metadata)
  else:
    save_adapter(args.out, model.adapter_state(), metadata)
  print(f"wrote the {'checkpoint' if update.full or update.borrowed else 'adapter'} to {args.out}")


if __name__ == "__main__":
  main()
