import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from conftest import write_model
from winnow_training.adapter import read_adapter, save_adapter
from winnow_training.config import SourceConfig, TrainConfig, load_config
from winnow_training.data import write_tokens
from winnow_training.evaluate import live_tokens
from winnow_training.gate import Relaxation, Schedule, far_bias, hard_bias, hard_rate, relax
from winnow_training.loss import forward_kl
from winnow_training.model import Gate, Model
from winnow_training.train import CHECKPOINT, Trainer, build_stream, train

CPU = torch.device("cpu")


def tiny_config(**changes):
  values = dict(base="tiny", steps=12, window=8, length=64, recall=0.0, lora_rank=2, lora_alpha=4.0, lr_heads=2e-3,
                lr_lora=2e-3, sources=(SourceConfig("a.bin", 1.0),),
                schedule=Schedule(final_ratio=4.0, ramp=0.4, decay_from=0.5))
  return TrainConfig(**(values | changes))


@pytest.fixture
def data(tmp_path):
  rng = np.random.default_rng(0)
  write_tokens(tmp_path / "a.bin", [rng.integers(1, 257, 500).tolist() for _ in range(4)], separator=0)
  return tmp_path


def trainer(config, tiny, data):
  torch.manual_seed(config.seed)
  model = Model.load(tiny, CPU, torch.float32, config.lora_rank, config.lora_alpha)
  return Trainer(config, model, build_stream(config, data, Tokenizer.from_file(str(tiny / "tokenizer.json"))), CPU)


def test_bit_of_the_next_token_decides():
  logits = torch.tensor([[[-5.0, 3.0, -5.0, 2.0]]])
  assert hard_bias(logits).tolist() == [[[float("-inf"), 0.0, float("-inf"), 0.0]]]
  soft = far_bias(logits)
  torch.testing.assert_close(soft[0, 0, 0], (1 - torch.tensor(3.0).sigmoid()).log())
  assert soft[0, 0, 3] == 0.0


def test_live_tokens_counts_the_window_and_the_survivors():
  logits = torch.full((1, 1, 2, 10), 5.0)
  logits[0, 0, 1, 3] = -5.0                       # keeps token 2
  assert live_tokens(logits, window=3).tolist() == [[4, 5]]


def test_hard_rate_counts_bits_and_passes_the_soft_gradient():
  x = torch.tensor([-1.0, 2.0, 0.5, -3.0], requires_grad=True)
  rate = hard_rate(x)
  assert rate.item() == pytest.approx(0.5)
  rate.backward()
  torch.testing.assert_close(x.grad, torch.sigmoid(x.detach()) * torch.sigmoid(-x.detach()) / 4)


def test_noise_is_logistic():
  uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
  noisy = relax(torch.zeros(200_000), uniform, Relaxation(1.0, torch.tensor(1.0)))
  assert (noisy > 1.0).float().mean().item() == pytest.approx(1 / (1 + np.e), abs=0.005)


def test_schedule():
  s = Schedule(final_ratio=8.0, ramp=0.4, decay_from=0.4, floor=0.0, warmup=0.1, noise=1.0, noise_end=0.2)
  assert s.evicted(0.2) == pytest.approx(0.4375) and s.evicted(0.9) == pytest.approx(0.875)
  assert s.learning_rate(0.05) == pytest.approx(0.5) and s.learning_rate(0.7) == pytest.approx(0.5)
  assert s.noise_amplitude(0.5) == 1.0 and s.noise_amplitude(1.0) == pytest.approx(0.2)


def test_forward_kl_and_its_gradient():
  g = torch.Generator().manual_seed(0)
  student = torch.randn(5, 8, generator=g, requires_grad=True)
  teacher, head = torch.randn(5, 8, generator=g), torch.randn(20, 8, generator=g)
  log_s, log_t = (student @ head.T).log_softmax(-1), (teacher @ head.T).log_softmax(-1)
  expected = torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1).mean()
  got = forward_kl(student, teacher, head)
  torch.testing.assert_close(got, expected)
  torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(expected, student))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_untrained_student_equals_the_base(tmp_path, kind):
  """Zero heads keep every token (logit -5), a zero B changes no weight."""
  model = Model.load(write_model(tmp_path / kind, model_type=kind), CPU, torch.float32, 2, 4.0)
  tokens = torch.randint(1, 257, (1, 40), generator=torch.Generator().manual_seed(1))
  base, _ = model(tokens)
  student, logits = model(tokens, Gate(window=4))
  torch.testing.assert_close(student, base)
  assert (logits == -5.0).all()


def test_eviction_hides_exactly_the_evicted_keys(tiny):
  """Changing an evicted token's cached values must not reach queries behind the window."""
  model = Model.load(tiny, CPU, torch.float32)
  with torch.no_grad():
    for layer in model.layers:
      layer.dms_proj.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
  tokens = torch.randint(1, 257, (1, 40), generator=torch.Generator().manual_seed(1))
  _, logits = model(tokens, Gate(window=4))
  assert 0.1 < (logits > 0).float().mean() < 0.9
  kept, _ = model(tokens, Gate(window=40))
  torch.testing.assert_close(kept, model(tokens)[0])
  assert not torch.allclose(model(tokens, Gate(window=4))[0], kept, atol=1e-3)


def test_merged_adapter_equals_the_trained_student(tiny, tmp_path):
  model = Model.load(tiny, CPU, torch.float32, 2, 4.0)
  with torch.no_grad():
    for p in model.parameters():
      p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
  save_adapter(tmp_path / "adapter", model.adapter_state(), "tiny", 8, 4.0, 2, 4.0)
  state, metadata = read_adapter(tmp_path / "adapter")
  assert metadata["lora_rank"] == 2 and metadata["dms_window_size"] == 8
  assert state["model.layers.1.self_attn.k_proj.lora_A"].shape == (2, 64)
  assert state["model.layers.1.self_attn.k_proj.lora_B"].shape == (32, 2)
  merged = Model.load(tiny, CPU, torch.float32, 2, 4.0)
  merged.load_adapter(state, merge=True)
  tokens = torch.randint(1, 257, (1, 40), generator=torch.Generator().manual_seed(1))
  a, b = model(tokens, Gate(8, dense=True))[0], merged(tokens, Gate(8, dense=True))[0]
  assert (a - b).norm() / a.norm() < 0.02     # merging rounds the weights to BF16
  assert (a - model(tokens)[0]).norm() / a.norm() > 0.05


def test_training_evicts_and_stays_near_the_base(tiny, data, tmp_path):
  run = trainer(tiny_config(steps=240, rate_weight=20.0), tiny, data)
  assert train(run, tmp_path, stop_after=None, log_every=20)
  lines = [json.loads(line) for line in (tmp_path / "train.log.jsonl").read_text().splitlines()]
  assert len(lines) == 12
  assert lines[0]["rate"] < 0.35 and 0.5 < lines[-1]["rate"] < 0.85
  assert 0 <= lines[0]["kl"] < lines[-1]["kl"] < 4.0    # Random text: every evicted token costs.


def test_a_resumed_run_equals_an_unbroken_one(tiny, data, tmp_path):
  whole = trainer(tiny_config(), tiny, data)
  train(whole, tmp_path, None, 100)
  broken = trainer(tiny_config(), tiny, data)
  for _ in range(5):
    broken.run_step()
  broken.save(tmp_path / CHECKPOINT)
  resumed = trainer(tiny_config(), tiny, data)
  resumed.restore(tmp_path / CHECKPOINT)
  train(resumed, tmp_path, None, 100)
  for (name, a), b in zip(whole.model.adapter_state().items(), resumed.model.adapter_state().values()):
    torch.testing.assert_close(a, b, msg=name)
  other = trainer(tiny_config(seed=2), tiny, data)
  with pytest.raises(ValueError, match="another configuration"):
    other.restore(tmp_path / CHECKPOINT)


def test_stop_after_pauses_with_a_checkpoint(tiny, data, tmp_path):
  run = trainer(tiny_config(), tiny, data)
  assert not train(run, tmp_path, stop_after=0.0, log_every=1)
  assert run.step == 1 and (tmp_path / CHECKPOINT).exists()


def test_accumulated_sequences_average_their_gradients(tiny, data):
  two = trainer(tiny_config(accumulate=2, clip=1e9), tiny, data)
  two.run_step()
  one = trainer(tiny_config(clip=1e9), tiny, data)
  one._noise.fill_(1.0)
  expected = None
  for i in range(2):
    one._sequence(i)
    parts = [p.grad.clone() / 2 for p in one._parameters]
    expected = parts if expected is None else [a + b for a, b in zip(expected, parts)]
  for got, want in zip((p.grad for p in two._parameters), expected):
    torch.testing.assert_close(got, want)


def test_frozen_base_mode_trains_heads_alone(tiny, data):
  run = trainer(tiny_config(lora_rank=0), tiny, data)
  run.run_step()
  assert {n.rsplit(".", 1)[1] for n, _ in run.model.named_parameters()} == {"dms_norm", "dms_proj"}


def test_config_rejects_unknown_keys(tmp_path):
  text = 'base = "x"\nsteps = 1\n[schedule]\nfinal_ratio = 8.0\n[[sources]]\npath = "a.bin"\nweight = 1.0\n'
  (tmp_path / "good.toml").write_text(text)
  assert load_config(tmp_path / "good.toml", steps=7).steps == 7
  (tmp_path / "bad.toml").write_text("windw = 3\n" + text)
  with pytest.raises(ValueError, match="windw"):
    load_config(tmp_path / "bad.toml")
