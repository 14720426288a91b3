import json

import pytest
import torch

from winnow_training.attention import BLOCK
from winnow_training.model import Gate, Model
from winnow_training.needles import Decoder, Task, read_tasks, summarize, wilson

CPU = torch.device("cpu")
WINDOW = 6


@pytest.fixture
def model(tiny):
  model = Model.load(tiny, CPU, torch.float32)
  with torch.no_grad():
    for i, layer in enumerate(model.layers):
      layer.dms_proj.normal_(std=0.06, generator=torch.Generator().manual_seed(i))
  return model


def stepwise(model, prompt, count, gate):
  """Greedy continuation by a whole forward a token."""
  tokens = list(prompt)
  for _ in range(count):
    hidden, _ = model(torch.tensor(tokens)[None], gate)
    tokens.append(int((hidden[0, -1] @ model.head.T).argmax()))
  return tokens[len(prompt):]


@pytest.mark.parametrize("window", [None, WINDOW])
def test_cached_decoding_of_a_ragged_batch_equals_whole_forwards(model, window):
  g = torch.Generator().manual_seed(5)
  prompts = [torch.randint(1, 257, (n,), generator=g).tolist() for n in (20, 41, 33)]
  gate = None if window is None else Gate(window)
  _, logits = model(torch.tensor(prompts[1])[None], Gate(WINDOW))
  assert 0.2 < (logits > 0).float().mean() < 0.9
  expected = [stepwise(model, p, 12, gate) for p in prompts]
  assert Decoder(model, window, 0.0, None).generate(prompts, 12, []) == expected
  if window is not None:    # and eviction matters
    assert expected != [stepwise(model, p, 12, None) for p in prompts]


def test_a_row_ends_at_its_stop(model):
  prompt = list(range(1, 30))
  free = Decoder(model, None, 0.0, None).generate([prompt], 8, [])[0]
  stop = free[3]
  assert Decoder(model, None, 0.0, None).generate([prompt], 8, [stop])[0] == free[:free.index(stop)]


def test_wilson():
  assert wilson(0, 0) == (0.0, 1.0)
  low, high = wilson(95, 100)
  assert (low, high) == (pytest.approx(0.8882, abs=1e-3), pytest.approx(0.9785, abs=1e-3))
  assert wilson(200, 200)[0] == pytest.approx(0.9812, abs=1e-3)


def task(name, base, adapter, answers=("12345",)):
  return Task(name, "single", 1024, 0.5, [1], list(answers), 4, {"base": base, "dms": adapter})


def test_summary_counts_against_what_the_base_finds():
  tasks = [task("a", "it is 12345.", "12345"), task("b", "12345", "54321"), task("c", "no", "12345"),
           task("d", "12345 77", "12345", ("12345", "77"))]
  assert summarize(tasks, ["base", "dms"]) == {
      "tasks": 4, "base": 3,
      "dms": {"found": 2, "both": 1, "of_base": 0.3333, "wilson95": [round(x, 4) for x in wilson(1, 3)]}}


def test_tasks_are_checked(tmp_path):
  good = {"id": "a", "kind": "single", "context": 64, "depth": 0.0, "prompt_ids": [1, 2], "answers": ["x"],
          "max_new_tokens": 3}
  path = tmp_path / "t.jsonl"
  path.write_text(json.dumps(good) + "\n\n" + json.dumps(good | {"extra": 1}) + "\n")
  assert len(read_tasks(path, 10)) == 2
  for bad in ({"prompt_ids": [99]}, {"prompt_ids": []}, {"answers": []}, {"kind": "odd"}, {"max_new_tokens": 0}):
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | bad) + "\n")
    with pytest.raises(ValueError, match="t.jsonl:2"):
      read_tasks(path, 10)
  path.write_text("{}\n")
  with pytest.raises(ValueError, match="t.jsonl:1"):
    read_tasks(path, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_compiled_prefill_equals_the_reference():
  from winnow_training import attention
  g = torch.Generator().manual_seed(1)
  draw = lambda heads: torch.randn(2, heads, 6 * BLOCK, 64, generator=g).cuda()
  q, k, v = draw(4), draw(2), draw(2)
  bias = torch.where(torch.rand(2, 2, 6 * BLOCK, generator=g).cuda() < 0.9, float("-inf"), 0.0)
  torch.testing.assert_close(attention.compact_compiled(q, k, v, bias, 200), attention.masked(q, k, v, bias, 200),
                             rtol=1e-4, atol=1e-4)
