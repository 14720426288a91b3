import pytest
import torch
from safetensors.torch import save_file

from conftest import write_model
from winnow_training.compare_engine import compare, read_dump
from winnow_training.model import Gate, Model, Update

CPU = torch.device("cpu")
WINDOW = 8


@pytest.fixture(params=["llama", "qwen3", "borrowed"])
def model(request, tmp_path):
  kind = "qwen3" if request.param == "qwen3" else "llama"
  model = Model.load(write_model(tmp_path / kind, model_type=kind), CPU, torch.float32,
                     Update(borrowed=request.param == "borrowed"))
  with torch.no_grad():
    for i, layer in enumerate(model.layers):
      gate = layer.borrow if layer.borrowed else layer.dms_proj
      gate.normal_(std=0.06, generator=torch.Generator().manual_seed(i))
      if layer.borrowed:
        layer.q_proj[[15, 47]] = gate    # where a checkpoint holds them
  model.set_cache_dtype(torch.bfloat16)
  return model


def write_dump(path, model, change=lambda tensors: None):
  """A dump by the package's own model, another program than the comparison's reference."""
  tokens = torch.randint(1, 257, (96,), generator=torch.Generator().manual_seed(1))
  with torch.no_grad():
    hidden, logits = model(tokens[None], Gate(WINDOW))
    tensors = {"tokens": tokens.int(), "logits": hidden[0, -5:] @ model.head.T,
               "decisions": (logits[:, 0] > 0).transpose(1, 2).contiguous().to(torch.uint8)}
  change(tensors)
  save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"mode": "dms-bf16"})
  return read_dump(path)


def test_another_program_agrees(model, tmp_path):
  report = compare(model, write_dump(tmp_path / "d", model), WINDOW, 5.0)
  assert 0.2 < report["evicted"] < 0.9 and report["differ"] <= 2
  assert report["agrees"] or report["differ"] > 1, report    # 384 decisions: one tie may be over 0.5 %
  assert report["logit_error"] <= report["logit_bound"], report


def test_a_decision_far_from_its_threshold_is_noticed(model, tmp_path):
  def flip(tensors):
    tensors["decisions"][1, 90, 0] ^= 1    # inside the window: no logit changes
  report = compare(model, write_dump(tmp_path / "d", model, flip), WINDOW, 5.0)
  assert not report["agrees"] and report["largest_differing"] > report["decision_bound"]
  assert report["logit_error"] <= report["logit_bound"]


def test_a_wrong_window_is_noticed(model, tmp_path):
  report = compare(model, write_dump(tmp_path / "d", model), WINDOW + 1, 5.0)
  assert not report["agrees"] and report["logit_error"] > report["logit_bound"]


def test_a_dump_without_logits_is_refused(tmp_path):
  save_file({"tokens": torch.zeros(3, dtype=torch.int32)}, tmp_path / "d")
  with pytest.raises(ValueError, match="logits"):
    read_dump(tmp_path / "d")
