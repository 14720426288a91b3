"""Retrofits DMS onto a model: `python -m winnow_training.train --config C --model DIR --data DIR --out DIR`.

Teacher: the base model. Student: the same weights with eviction and, if configured, a low-rank update. Loss: forward
KL per token plus a one-sided penalty on the evicted share. A run is exact to the step: killed or stopped
(`--stop-after`), the same command goes on from the last checkpoint.
"""

import argparse
import dataclasses
import json
import os
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer

from winnow_training.adapter import save_adapter
from winnow_training.attention import window_mask
from winnow_training.config import TrainConfig, load_config
from winnow_training.data import SequenceStream, Source, read_tokens
from winnow_training.gate import Relaxation, hard_rate
from winnow_training.loss import forward_kl
from winnow_training.model import Gate, Model

CHECKPOINT = "checkpoint.pt"


class Trainer:
  """One run: model, optimizer and position. Not thread-safe.

  On a GPU the forward and backward of one sequence are captured once as a CUDA graph; what changes from step to step
  (tokens, noise, targets) goes through fixed tensors.
  """

  def __init__(self, config: TrainConfig, model: Model, stream: SequenceStream, device: torch.device):
    self.config, self.model, self.stream, self.device = config, model, stream, device
    self.step = 0
    heads = [p for n, p in model.named_parameters() if ".lora." not in n]
    lora = [p for n, p in model.named_parameters() if ".lora." in n]
    groups = [{"params": heads, "base_lr": config.lr_heads}, {"params": lora, "base_lr": config.lr_lora}]
    self._parameters = heads + lora
    self._optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.95),
                                        weight_decay=0.0, fused=device.type == "cuda")
    self._tokens = torch.zeros(1, config.length, dtype=torch.int64, device=device)
    self._uniform = torch.full((model.config.layers, 1, model.config.kv_heads, config.length), 0.5, device=device)
    self._noise, self._target = torch.zeros((), device=device), torch.zeros((), device=device)
    near = window_mask(config.length, config.window, device) if device.type == "cuda" else None
    self._gate = Gate(config.window, Relaxation(config.tau, self._noise), near)
    self._graph: torch.cuda.CUDAGraph | None = None
    if device.type == "cuda":
      model.compile_layers()

  def _forward_backward(self) -> tuple[torch.Tensor, torch.Tensor]:
    """KL and hard rate of the current tokens; leaves the gradient in the parameters."""
    with torch.no_grad():
      teacher, _ = self.model(self._tokens)
    student, relaxed = self.model(self._tokens, self._gate, self._uniform)
    kl = forward_kl(student[0], teacher[0], self.model.head)
    rate = hard_rate(relaxed)
    (kl + self.config.rate_weight * torch.relu(self._target - rate)).backward()
    return kl.detach(), rate.detach()

  def _capture(self) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
      for _ in range(3):    # Compiles, and lets the allocator settle.
        self._forward_backward()
        self._optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    self._graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(self._graph):
      self._outputs = self._forward_backward()

  def _sequence(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient and figures of sequence `index`, which with the seed fixes its tokens and noise."""
    tokens = torch.from_numpy(self.stream[index])[None]
    self._tokens.copy_(tokens.pin_memory() if self.device.type == "cuda" else tokens, non_blocking=True)
    generator = torch.Generator(self.device).manual_seed(self.config.seed * 1_000_003 + index)
    self._uniform.uniform_(1e-6, 1.0 - 1e-6, generator=generator)
    if self.device.type != "cuda":
      self._optimizer.zero_grad(set_to_none=True)
      return self._forward_backward()
    if self._graph is None:
      self._capture()
    self._graph.replay()    # Overwrites the gradients.
    return self._outputs

  def run_step(self) -> dict[str, torch.Tensor | float]:
    """One optimizer step; returns its figures (tensors stay on the device)."""
    c, progress = self.config, self.step / self.config.steps
    target, factor = c.schedule.evicted(progress), c.schedule.learning_rate(progress)
    self._noise.fill_(c.schedule.noise_amplitude(progress))
    self._target.fill_(target)
    for group in self._optimizer.param_groups:
      group["lr"] = group["base_lr"] * factor
    kl = rate = 0.0
    gradients: list[torch.Tensor] = []
    for i in range(c.accumulate):
      one_kl, one_rate = self._sequence(self.step * c.accumulate + i)
      kl, rate = kl + one_kl / c.accumulate, rate + one_rate / c.accumulate
      if c.accumulate > 1:
        parts = [p.grad / c.accumulate for p in self._parameters]
        gradients = [a + b for a, b in zip(gradients, parts)] if gradients else parts
    for parameter, gradient in zip(self._parameters, gradients):
      parameter.grad.copy_(gradient)
    norm = torch.nn.utils.clip_grad_norm_(self._parameters, c.clip)
    self._optimizer.step()
    self.step += 1
    return {"kl": kl, "rate": rate, "target": target, "lr": factor,
            "noise": c.schedule.noise_amplitude(progress), "grad": norm}

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
  """Runs to the end (True) or until `stop_after` seconds have passed (False). Logs a JSON line every few steps."""
  started = last_save = mark = time.monotonic()
  config, marked = trainer.config, trainer.step
  with open(out / "train.log.jsonl", "a") as log:
    while trainer.step < config.steps:
      figures = trainer.run_step()
      if trainer.step % log_every == 0 or trainer.step == config.steps:
        figures = {k: round(float(v), 5) for k, v in figures.items()}
        now = time.monotonic()
        speed = (trainer.step - marked) * config.accumulate * config.length / (now - mark)
        mark, marked = now, trainer.step
        log.write(json.dumps({"step": trainer.step} | figures | {"tokens_s": round(speed)}) + "\n")
        log.flush()
        print(f"{trainer.step:5}/{config.steps}  kl {figures['kl']:.4f}  evicted {figures['rate']:.3f} of "
              f"{figures['target']:.3f}  lr x{figures['lr']:.2f}  {speed / 1000:.1f}k tokens/s", flush=True)
        if not figures["kl"] < 1e3:
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
  parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory of the base")
  parser.add_argument("--data", type=Path, required=True, help="folder that the config's sources are relative to")
  parser.add_argument("--out", type=Path, required=True)
  parser.add_argument("--steps", type=int, help="instead of the config's")
  parser.add_argument("--seed", type=int, help="instead of the config's")
  parser.add_argument("--stop-after", type=float, help="seconds; checkpoint and leave, to be resumed")
  parser.add_argument("--log-every", type=int, default=20)
  parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
  args = parser.parse_args()

  torch._dynamo.config.recompile_limit = 64
  device = torch.device(args.device)
  config = load_config(args.config, steps=args.steps, seed=args.seed)
  torch.manual_seed(config.seed)
  model = Model.load(args.model, device, torch.bfloat16, config.lora_rank, config.lora_alpha)
  stream = build_stream(config, args.data, Tokenizer.from_file(str(args.model / "tokenizer.json")))
  trainer = Trainer(config, model, stream, device)
  args.out.mkdir(parents=True, exist_ok=True)
  if (args.out / CHECKPOINT).exists():
    trainer.restore(args.out / CHECKPOINT)
    print(f"resumed at step {trainer.step}")
  else:
    shutil.copy(args.config, args.out / "config.toml")
  if not train(trainer, args.out, args.stop_after, args.log_every):
    print(f"paused at step {trainer.step} of {config.steps}: run the same command to go on")
    return
  save_adapter(args.out, model.adapter_state(), config.base, config.window, config.schedule.final_ratio,
               config.lora_rank, config.lora_alpha, config.offset)
  print(f"wrote the adapter to {args.out}")


if __name__ == "__main__":
  main()
