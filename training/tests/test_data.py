import numpy as np
import pytest
from tokenizers import Tokenizer

from winnow_training.corpus import cfg_to_text, html_to_text, pod_to_text
from winnow_training.data import SequenceStream, Source, read_tokens, write_tokens
from winnow_training.generate import loops


@pytest.mark.parametrize("name", ["t.bin", "t.bin.xz", "t.bin32"])
def test_token_files_round_trip(tmp_path, name):
  write_tokens(tmp_path / name, [[5, 6], [7]], separator=0)
  assert read_tokens(tmp_path / name, None).tolist() == [5, 6, 0, 7, 0]


def test_a_large_token_needs_bin32(tmp_path):
  with pytest.raises(ValueError, match="65536"):
    write_tokens(tmp_path / "t.bin", [[65536]], separator=None)


def test_folders_of_text(tmp_path, tiny):
  tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
  (tmp_path / "texts").mkdir()
  (tmp_path / "texts" / "b.txt").write_text("two")
  (tmp_path / "texts" / "a.txt").write_text("one ")
  assert tokenizer.decode(read_tokens(tmp_path / "texts", tokenizer).tolist(), False).replace(" ", "") == "oneĠtwo"


def test_stream_is_a_function_of_seed_and_index(tiny):
  tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
  sources = [Source(np.arange(5000) % 250 + 1, 1.0)]
  make = lambda seed: SequenceStream(sources, tokenizer, 600, 0.5, seed)
  assert (make(1)[3] == make(1)[3]).all()
  assert (make(1)[3] != make(2)[3]).any() and (make(1)[3] != make(1)[4]).any()


def test_recall_tasks_plant_the_answer_before_the_question(tiny):
  tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
  stream = SequenceStream([Source(np.full(9000, 250), 1.0)], tokenizer, 4000, 1.0, 1)
  for i in range(20):
    tokens = stream[i]
    assert tokens.shape == (4000,)
    text = tokenizer.decode([t for t in tokens.tolist() if t != 250], False).replace(" ", "").replace("Ġ", " ")
    ask = text.find("What is")
    statement, question = text[:ask], text[ask:]
    answer = question.replace("Answer: ", "assistantĊ").split("assistantĊ")[1].split("<")[0].split("Ċ")[0]
    assert answer and answer in statement


def test_extractors():
  assert html_to_text("<html><head><title>x</title></head><p>a &lt; b</p><script>no</script><p>c</p>") == "a < b\n\nc"
  assert pod_to_text("=head1 NAME\n\nB<bold> text\n\n=cut\n") == "NAME\n\nbold text"
  story = "x" * 50
  assert cfg_to_text(f'[message]\n speaker=narrator\n message= _ "{story}"\n id=_ "short"') == story


def test_looping_text_is_recognised():
  rng = np.random.default_rng(0)
  assert loops([7, 8, 9] * 400) and not loops(rng.integers(0, 40000, 1200).tolist())
