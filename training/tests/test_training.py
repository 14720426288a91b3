import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from conftest import write_model
from winnow_training.adapter import adapter_metadata, load_student, read_adapter, save_adapter, save_checkpoint
from winnow_training.config import SourceConfig, TrainConfig, load_config
from winnow_training.data import write_tokens
from winnow_training.evaluate import live_tokens
from winnow_training.gate import Relaxation, Schedule, far_bias, hard_bias, hard_rate, relax
from winnow_training.loss import forward_kl
from winnow_training.model import Gate, Model, Update, model_directory
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
  update = Update(config.rank, config.lora_alpha, config.tune == "full", config.gate == "borrowed")
  model = Model.load(tiny, CPU, torch.float32, update)
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
  model = Model.load(write_model(tmp_path / kind, model_type=kind), CPU, torch.float32, Update(2, 4.0))
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
  model = Model.load(tiny, CPU, torch.float32, Update(2, 4.0))
  with torch.no_grad():
    for p in model.parameters():
      p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
  save_adapter(tmp_path / "adapter", model.adapter_state(), adapter_metadata("tiny", 8, 4.0, Update(2, 4.0)))
  state, metadata = read_adapter(tmp_path / "adapter")
  assert metadata["lora_rank"] == 2 and metadata["dms_window_size"] == 8
  assert state["model.layers.1.self_attn.k_proj.lora_A"].shape == (2, 64)
  assert state["model.layers.1.self_attn.k_proj.lora_B"].shape == (32, 2)
  merged = Model.load(tiny, CPU, torch.float32, Update(2, 4.0))
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
  run = trainer(tiny_config(tune="heads"), tiny, data)
  run.run_step()
  assert {n.rsplit(".", 1)[1] for n, _ in run.model.named_parameters()} == {"dms_norm", "dms_proj"}


@pytest.mark.parametrize("gate", ["heads", "borrowed"])
@pytest.mark.parametrize("tune", ["lora", "full"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_checkpoint_equals_the_trained_student(tmp_path, data, gate, tune, kind):
  tiny = write_model(tmp_path / kind, model_type=kind)
  run = trainer(tiny_config(steps=30, gate=gate, tune=tune, rate_weight=20.0, lr_full=1e-3, lr_heads=1e-2), tiny, data)
  assert train(run, tmp_path, None, 10)
  tokens = torch.randint(1, 257, (1, 40), generator=torch.Generator().manual_seed(1))
  expected, logits = run.model(tokens, Gate(8))
  assert 0.02 < (logits > 0).float().mean() < 0.98
  update = Update(2, 4.0, tune == "full", gate == "borrowed")
  save_checkpoint(tmp_path / "out", tiny, run.model, adapter_metadata("tiny", 8, 4.0, update))
  student, metadata = load_student(tiny, tmp_path / "out", CPU, torch.float32)
  assert metadata["dms_separate_alpha"] == (gate == "heads") and metadata["dms_window_size"] == 8
  got, saved_logits = student(tokens, Gate(8))
  assert (saved_logits - logits).norm() / logits.norm() < 0.05    # Weights are rounded to BF16 on the way.
  same = ((saved_logits > 0) == (logits > 0)).float().mean()
  assert same > 0.95
  if same == 1.0:
    assert (got - expected).norm() / expected.norm() < 0.05


def test_a_borrowed_channel_leaves_the_attention(tiny):
  """The query channel that decides adds nothing to any score."""
  model = Model.load(tiny, CPU, torch.float32, Update(borrowed=True))
  tokens = torch.randint(1, 257, (1, 40), generator=torch.Generator().manual_seed(1))
  before, logits = model(tokens, Gate(40))
  assert (logits == -5.0).all()
  with torch.no_grad():
    for layer in model.layers:
      layer.borrow.normal_(std=0.1)
  after, logits = model(tokens, Gate(40))
  assert logits.std() > 1.0
  torch.testing.assert_close(after, before)


def test_dense_sequences_train_the_update_alone(tiny, data):
  run = trainer(tiny_config(dense=0.5), tiny, data)
  kinds = [run.is_dense(i) for i in range(12)]
  assert 0 < sum(kinds) < 12
  for kind in kinds:
    figures = run.run_step()
    assert ("kl_dense" in figures) == kind and ("rate" in figures) != kind
    heads = [p.grad for n, p in run.model.named_parameters() if "dms_" in n]
    assert all((g is None) == kind for g in heads)


def test_labels_shift_the_gradient_towards_the_text():
  g = torch.Generator().manual_seed(0)
  student = torch.randn(5, 8, generator=g, requires_grad=True)
  teacher, head = torch.randn(5, 8, generator=g), torch.randn(20, 8, generator=g)
  labels, weights = torch.tensor([3, 7, 0, 19, -1]), torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0])
  log_s, p_t = (student @ head.T).log_softmax(-1), (teacher @ head.T).softmax(-1)
  share = torch.where(labels >= 0, 0.25, 0.0)[:, None]
  taught = (1 - share) * p_t + share * torch.nn.functional.one_hot(labels.clamp(min=0), 20)
  expected = -((taught * log_s).sum(-1) * weights).mean()
  got = forward_kl(student, teacher, head, weights, labels, 0.25)
  torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(expected, student))


def test_a_gguf_file_is_converted_beside_itself(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr("subprocess.run", lambda command, check: calls.append(command))
  assert model_directory(tmp_path) == tmp_path and not calls
  assert model_directory(tmp_path / "m.gguf") == tmp_path / "m"
  script, source, target = calls[0][1:]
  assert script.endswith("scripts/convert_gguf.py") and Path(script).exists()
  assert (source, target) == (str(tmp_path / "m.gguf"), str(tmp_path / "m"))


def test_config_changes_are_toml(tmp_path):
  text = 'base = "x"\nsteps = 1\n[schedule]\nfinal_ratio = 8.0\n[[sources]]\npath = "a.bin"\nweight = 1.0\n'
  (tmp_path / "c.toml").write_text(text)
  config = load_config(tmp_path / "c.toml", ["schedule.final_ratio = 9.5", "dense=0.25", 'tune="full"'])
  assert (config.schedule.final_ratio, config.dense, config.tune, config.rank) == (9.5, 0.25, "full", 0)
  with pytest.raises(ValueError, match="tune"):
    load_config(tmp_path / "c.toml", ['tune="some"'])


def test_config_rejects_unknown_keys(tmp_path):
  text = 'base = "x"\nsteps = 1\n[schedule]\nfinal_ratio = 8.0\n[[sources]]\npath = "a.bin"\nweight = 1.0\n'
  (tmp_path / "good.toml").write_text(text)
  assert load_config(tmp_path / "good.toml", steps=7).steps == 7
  (tmp_path / "bad.toml").write_text("windw = 3\n" + text)
  with pytest.raises(ValueError, match="windw"):
    load_config(tmp_path / "bad.toml")
