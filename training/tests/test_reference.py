"""Against an independent implementation's golden values on the real model; skipped where either is absent.

WINNOW_MODEL_DIR: SmolLM2-135M-Instruct as a Hugging Face directory. With WINNOW_REQUIRE_DATA=1 absence is a failure.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from winnow_training.adapter import read_adapter
from winnow_training.evaluate import evaluate
from winnow_training.model import Gate, Model

PROBE = Path(__file__).parents[3] / "shared/data/smollm2_dms_probe"
MODEL = os.environ.get("WINNOW_MODEL_DIR")


@pytest.mark.skipif((MODEL is None or not PROBE.exists()) and os.environ.get("WINNOW_REQUIRE_DATA") != "1",
                    reason="needs WINNOW_MODEL_DIR and the probe's adapter")
def test_probe_adapter_gives_its_golden_values():
  golden = json.loads((PROBE / "golden_wiki_2048.json").read_text())[0]
  state, metadata = read_adapter(PROBE)
  cpu = torch.device("cpu")
  base, student = (Model.load(Path(MODEL), cpu, torch.float32) for _ in range(2))
  student.load_adapter(state, merge=True)
  text = (PROBE.parent / golden["file"]).read_text(encoding="utf-8")[:40_000]
  ids = Tokenizer.from_file(f"{MODEL}/tokenizer.json").encode(text, add_special_tokens=False).ids
  assert ids[:8] == golden["first_ids"]
  windows = torch.tensor(ids[:golden["tokens"]])[None]
  totals = evaluate(base, student, windows, {"dms": Gate(metadata["dms_window_size"])}, {"dms": torch.bfloat16})["dms"]
  kept = torch.tensor(golden["kept_per_layer_head"])
  assert ((totals.kept - kept).abs() <= torch.clamp(0.02 * kept, min=4)).all()
  report = totals.report()
  assert report["kld"] == pytest.approx(golden["kld"], rel=0.03)
  assert totals.nll / totals.positions == pytest.approx(golden["nll"], abs=2e-3)
  assert totals.nll_base / totals.positions == pytest.approx(golden["nll_base"], abs=1e-3)
