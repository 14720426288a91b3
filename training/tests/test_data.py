import bz2
import lzma
import zlib

import numpy as np
import pytest
from tokenizers import Tokenizer

from winnow_training.corpus import backquoted_text, cfg_to_text, html_to_text, pod_to_text, rdb_to_text, ruleset_to_text, spaced
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
  assert (make(1)[3][0] == make(1)[3][0]).all() and (make(1)[3][1] == make(1)[3][1]).all()
  assert (make(1)[3][0] != make(2)[3][0]).any() and (make(1)[3][0] != make(1)[4][0]).any()


def test_recall_tasks_plant_the_answer_before_the_question(tiny):
  tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
  stream = SequenceStream([Source(np.full(9000, 250), 1.0)], tokenizer, 4000, 1.0, 1)
  for i in range(40):
    tokens, answers = stream[i]
    assert tokens.shape == answers.shape == (4000,) and answers.any()
    # The outputs at `answers` predict the answer: what follows each of them is stated before.
    first = int(answers.argmax())
    text = lambda ids: tokenizer.decode([t for t in ids if t != 250], False).replace(" ", "").replace("Ġ", " ")
    answer = text(tokens[first + 1:first + 1 + int((~answers[first:]).argmax())].tolist()).strip()
    assert answer and answer in text(tokens[:first + 1].tolist()), answer


def test_extractors():
  assert html_to_text("<html><head><title>x</title></head><p>a &lt; b</p><script>no</script><p>c</p>") == "a < b\n\nc"
  assert pod_to_text("=head1 NAME\n\nB<bold> text\n\n=cut\n") == "NAME\n\nbold text"
  long = "The city was founded, in legend, by two brothers whom a wolf had raised. "
  assert ruleset_to_text('legend=_("' + long + '\\\n' + long + '")') == (long + long).strip()
  assert backquoted_text("mission x\n\t`" + long + "`\n\t`no`") == long.strip()
  assert spaced("He's 3,000 well-known (old) men.") == "He 's 3 @,@ 000 well @-@ known ( old ) men ."
  story = "x" * 50
  assert cfg_to_text(f'[message]\n speaker=narrator\n message= _ "{story}"\n id=_ "short"') == story


def test_looping_text_is_recognised():
  rng = np.random.default_rng(0)
  assert loops([7, 8, 9] * 400) and not loops(rng.integers(0, 40000, 1200).tolist())


@pytest.mark.parametrize("pack, kind", [(zlib.compress, b""), (bz2.compress, b"2"), (lzma.compress, b"Z")])
def test_strings_of_an_r_package(pack, kind):
  string = lambda text: b"\0\4\0\x09" + len(text).to_bytes(4, "big") + text
  plain = b"X\n\0\0\0\2" + string(b"It is a truth universally acknowledged,") + string(b"") + string(b"that a man")
  block = len(plain).to_bytes(4, "big") + kind + pack(plain)
  assert rdb_to_text(block + block).splitlines() == ["It is a truth universally acknowledged,", "", "that a man"] * 2
