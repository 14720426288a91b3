import json
import sys

import pytest

from winnow_training import threshold

MODES = {"dms@+0": {"kld": 0.020, "live_ratio": 6.0}, "dms@+2": {"kld": 0.010, "live_ratio": 5.0},
         "dms@-2": {"kld": 0.040, "live_ratio": 7.0}, "update-alone": {"kld": 0.001}}


def test_the_smallest_step_that_every_text_allows():
  easy = {"text": "a", "context": 64, "modes": {k: v | {"kld": v["kld"] / 2} for k, v in MODES.items()}}
  hard = {"text": "b", "context": 64, "modes": MODES}
  curves = {r["text"]: threshold.curve(r) for r in (easy, hard)}
  assert threshold.choose(curves, 0.0175, 0.25) == 0.5
  assert threshold.at(curves["b"], 0.5) == (pytest.approx(0.0175), pytest.approx(5.75))
  with pytest.raises(ValueError, match="0.001"):
    threshold.choose(curves, 0.001, 0.25)
  with pytest.raises(ValueError, match="outside"):
    threshold.at(curves["b"], 3.0)


def test_thresholds_count_from_the_trained_offset():
  assert threshold.curve({"offset": 6.5, "modes": MODES})[0][0] == -0.5


def test_the_offset_goes_into_the_metadata(tmp_path, monkeypatch):
  (tmp_path / "f.json").write_text(json.dumps({"text": "b", "context": 64, "modes": MODES}))
  (tmp_path / "dms_metadata.json").write_text('{"dms_initial_alpha_offset": 5.0, "base": "x"}')
  monkeypatch.setattr(sys, "argv", ["threshold", str(tmp_path / "f.json"), "--write", str(tmp_path)])
  threshold.main()
  assert json.loads((tmp_path / "dms_metadata.json").read_text()) == {"dms_initial_alpha_offset": 5.5, "base": "x"}
