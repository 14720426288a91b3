"""Whole conversions of tiny files: weights, row order, rope scaling, tokenizer, refusals."""

import os
import struct
import subprocess
import sys
import tempfile
import unittest

import convert_gguf
import numpy as np
import tiny_gguf
from ggufconv import dequant, hf_model
from ggufconv.errors import ConversionError

SCRIPT = os.path.abspath(convert_gguf.__file__)


class ConvertTest(unittest.TestCase):
    def setUp(self):
        self._temp = tempfile.TemporaryDirectory()
        self.addCleanup(self._temp.cleanup)
        self.dir = self._temp.name
        self.source = os.path.join(self.dir, "tiny.gguf")
        self.target = os.path.join(self.dir, "out", "model")

    def write(self, metadata, tensors, version=3):
        with open(self.source, "wb") as file:
            file.write(tiny_gguf.gguf(metadata, tensors, version))

    def convert(self, metadata, tensors, version=3, **options):
        self.write(metadata, tensors, version)
        convert_gguf.convert(self.source, self.target, quiet=True, **options)

    def json(self, name):
        return tiny_gguf.read_json(self.target, name)

    def assert_refused(self, metadata, tensors, *words):
        with self.assertRaises(ConversionError) as caught:
            self.convert(metadata, tensors)
        for word in words:
            self.assertIn(word, str(caught.exception))
        self.assert_nothing_written()

    def assert_nothing_written(self):
        parent = os.path.dirname(self.target)
        self.assertEqual(os.listdir(parent) if os.path.isdir(parent) else [], [])

    def assert_weights(self, expected):
        actual = tiny_gguf.read_safetensors(os.path.join(self.target, "model.safetensors"))
        self.assertEqual(set(actual), set(expected))
        for name, values in expected.items():
            np.testing.assert_array_equal(actual[name], dequant.to_bfloat16(values), err_msg=name)


class WeightsTest(ConvertTest):
    def test_llama_rows_are_put_back(self):
        metadata, tensors, expected = tiny_gguf.model("llama")
        self.convert(metadata, tensors)
        self.assert_weights(expected)

    def test_qwen3_rows_stay(self):
        metadata, tensors, expected = tiny_gguf.model("qwen3")
        self.convert(metadata, tensors)
        self.assert_weights(expected)

    def test_the_rotation_is_the_same_after_reordering(self):
        # llama.cpp rotates pairs (2i, 2i + 1), Hugging Face pairs (i, i + dim / 2): scores agree.
        rng = np.random.default_rng(3)
        q, k = rng.normal(size=(2, 8))
        angle = rng.uniform(0, 6, 4)

        def rotated(x, first, second):
            y = np.empty(8)
            y[first] = x[first] * np.cos(angle) - x[second] * np.sin(angle)
            y[second] = x[second] * np.cos(angle) + x[first] * np.sin(angle)
            return y

        half, even = np.arange(4), np.arange(0, 8, 2)
        q_hf, k_hf = (hf_model.unpermute(x[:, None], 1)[:, 0] for x in (q, k))
        self.assertAlmostEqual(
            rotated(q, even, even + 1) @ k, rotated(q_hf, half, half + 4) @ k_hf, places=12
        )

    def test_small_chunks_give_the_same(self):
        metadata, tensors, _ = tiny_gguf.model("llama")
        self.write(metadata, tensors)
        gguf = convert_gguf.GgufFile(self.source)
        model = hf_model.HfModel(gguf)
        for tensor in model.tensors:
            whole = np.concatenate(list(model.chunks(tensor, 1 << 20)))
            pieces = list(model.chunks(tensor, 7 * tiny_gguf.HIDDEN))
            np.testing.assert_array_equal(whole, np.concatenate(pieces), err_msg=tensor.name)
        gguf.close()

    def test_quantized_and_half_tensors(self):
        metadata, tensors, expected = tiny_gguf.model("llama")
        name, hf_name = "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"
        values = expected[hf_name]
        halves = values.astype(np.float16)
        tensors[name] = (list(values.shape), dequant.F16, halves.tobytes())
        expected[hf_name] = halves.astype(np.float32)
        # Q8_0: each row of 64 is two blocks of a scale and 32 signed bytes.
        name, hf_name = "blk.1.ffn_gate.weight", "model.layers.1.mlp.gate_proj.weight"
        rng = np.random.default_rng(5)
        quants = rng.integers(-127, 128, (96 * 2, 32)).astype(np.int8)
        scale = np.float16(0.01)
        raw = b"".join(struct.pack("<e", scale) + row.tobytes() for row in quants)
        tensors[name] = ([96, 64], dequant.Q8_0, raw)
        expected[hf_name] = (np.float32(scale) * quants.astype(np.float32)).reshape(96, 64)
        self.convert(metadata, tensors, version=2)
        self.assert_weights(expected)

    def test_config(self):
        metadata, tensors, _ = tiny_gguf.model("qwen3", tied=False)
        self.convert(metadata, tensors)
        config = self.json("config.json")
        wanted = {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "max_position_embeddings": 256,
            "vocab_size": len(tiny_gguf.TOKENS),
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 1,
        }
        self.assertEqual({key: config[key] for key in wanted}, wanted)

    def test_tied_embeddings(self):
        metadata, tensors, _ = tiny_gguf.model("llama")
        self.convert(metadata, tensors)
        self.assertIs(self.json("config.json")["tie_word_embeddings"], True)


class RopeScalingTest(ConvertTest):
    def convert_with(self, factors):
        metadata, tensors, expected = tiny_gguf.model("llama")
        tensors["rope_freqs.weight"] = ([len(factors)], 0, factors.astype(np.float32).tobytes())
        self.convert(metadata, tensors)
        self.assert_weights(expected)
        return self.json("config.json")["rope_scaling"]

    def test_in_a_file(self):
        factors = hf_model.llama3_factors(10000.0, 16, 8.0, 1.0, 4.0, 8192)
        self.assertEqual(
            self.convert_with(factors),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        )

    def test_none_if_all_are_one(self):
        self.assertIsNone(self.convert_with(np.ones(8)))

    def test_recovers_what_gives_the_same_factors(self):
        for head_dim, theta in ((64, 500000.0), (128, 500000.0), (128, 1e6)):
            for factor, low, high, original in (
                (8.0, 1.0, 4.0, 8192),
                (32.0, 1.0, 4.0, 8192),
                (4.0, 1.0, 8.0, 2048),
                (16.0, 2.0, 8.0, 16384),
                (2.5, 1.0, 3.0, 4096),
            ):
                with self.subTest(head_dim=head_dim, factor=factor, original=original):
                    factors = hf_model.llama3_factors(theta, head_dim, factor, low, high, original)
                    found = hf_model.recover_llama3_scaling(factors, theta, head_dim)
                    again = hf_model.llama3_factors(
                        theta,
                        head_dim,
                        found["factor"],
                        found["low_freq_factor"],
                        found["high_freq_factor"],
                        found["original_max_position_embeddings"],
                    )
                    np.testing.assert_allclose(again, factors, rtol=2e-6)
                    self.assertEqual(found["factor"], factor)

    def test_others_are_refused(self):
        metadata, tensors, _ = tiny_gguf.model("llama")
        for factors in (np.arange(1, 9), np.full(8, 4.0), np.zeros(8), np.full(8, np.nan)):
            tensors["rope_freqs.weight"] = ([8], 0, factors.astype(np.float32).tobytes())
            self.assert_refused(metadata, tensors, "rope_freqs.weight")


class TokenizerTest(ConvertTest):
    def converted(self, **changes):
        metadata, tensors, _ = tiny_gguf.model("llama")
        for key, content in changes.items():
            metadata[f"tokenizer.ggml.{key}"] = content
        self.convert(metadata, tensors, force=True)
        return self.json("tokenizer.json")

    def test_tokens_merges_and_ends(self):
        tokenizer = self.converted()
        self.assertEqual(tokenizer["model"]["vocab"], {t: i for i, t in enumerate(tiny_gguf.TOKENS)})
        self.assertEqual(tokenizer["model"]["merges"], ["a b", "ab c"])
        added = [(t["id"], t["content"], t["special"]) for t in tokenizer["added_tokens"]]
        self.assertEqual(added, [(0, "<|endoftext|>", True), (1, "<|im_end|>", True)])
        self.assertEqual(tokenizer["decoder"]["type"], "ByteLevel")
        self.assertIsNone(tokenizer["post_processor"])
        self.assertEqual(
            self.json("generation_config.json"), {"bos_token_id": 0, "eos_token_id": [1, 0]}
        )
        config = self.json("tokenizer_config.json")
        self.assertEqual(config["eos_token"], "<|im_end|>")
        self.assertIs(config["add_bos_token"], False)
        self.assertEqual(config["chat_template"], tiny_gguf.TEMPLATE)
        with open(os.path.join(self.target, "chat_template.jinja"), encoding="utf-8") as file:
            self.assertEqual(file.read(), tiny_gguf.TEMPLATE)
        self.assertEqual(
            self.json("special_tokens_map.json"),
            {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        )

    def test_trailing_added_tokens_stay_outside_the_vocabulary(self):
        metadata, tensors, _ = tiny_gguf.model("llama")
        metadata["tokenizer.ggml.tokens"] = ["a", "b", "ab", "<|im_end|>", "<tool>", "[PAD5]"]
        metadata["tokenizer.ggml.token_type"] = [1, 1, 1, 3, 4, 5]
        metadata["tokenizer.ggml.merges"] = ["a b"]
        metadata["tokenizer.ggml.bos_token_id"] = 3
        metadata["tokenizer.ggml.eos_token_id"] = 3
        self.convert(metadata, tensors)
        tokenizer = self.json("tokenizer.json")
        self.assertEqual(tokenizer["model"]["vocab"], {"a": 0, "b": 1, "ab": 2})
        added = [(t["id"], t["content"], t["special"]) for t in tokenizer["added_tokens"]]
        self.assertEqual(added, [(3, "<|im_end|>", True), (4, "<tool>", False)])

    def test_pre_tokenizers(self):
        smollm = self.converted(pre="smollm")["pre_tokenizer"]["pretokenizers"]
        self.assertEqual([p["type"] for p in smollm], ["Digits", "ByteLevel"])
        self.assertTrue(smollm[1]["use_regex"])
        gpt2 = self.converted(pre="gpt-2")
        self.assertEqual(gpt2["pre_tokenizer"]["type"], "ByteLevel")
        qwen2 = self.converted(pre="qwen2")
        self.assertEqual(qwen2["normalizer"], {"type": "NFC"})
        split, byte_level = qwen2["pre_tokenizer"]["pretokenizers"]
        self.assertIn(r"|\p{N}|", split["pattern"]["Regex"])
        self.assertFalse(byte_level["use_regex"])

    def test_llama3_adds_bos_unless_told_otherwise(self):
        metadata, tensors, _ = tiny_gguf.model("llama")
        metadata["tokenizer.ggml.pre"] = "llama-bpe"
        del metadata["tokenizer.ggml.add_bos_token"]
        self.convert(metadata, tensors)
        tokenizer = self.json("tokenizer.json")
        self.assertTrue(tokenizer["model"]["ignore_merges"])
        self.assertEqual(tokenizer["post_processor"]["type"], "TemplateProcessing")
        self.assertEqual(
            tokenizer["post_processor"]["special_tokens"]["<|endoftext|>"]["ids"], [0]
        )
        self.assertIs(self.json("tokenizer_config.json")["add_bos_token"], True)
        metadata["tokenizer.ggml.add_bos_token"] = False
        self.convert(metadata, tensors, force=True)
        self.assertIsNone(self.json("tokenizer.json")["post_processor"])


class RefusalTest(ConvertTest):
    def test_by_name(self):
        cases = {
            "general.architecture": ("gemma", ["'gemma'", "llama and qwen3"]),
            "tokenizer.ggml.model": ("llama", ["SentencePiece"]),
            "tokenizer.ggml.pre": ("tekken", ["tekken"]),
            "llama.expert_count": (8, ["llama.expert_count = 8"]),
            "llama.rope.scaling.type": ("yarn", ["yarn"]),
            "llama.rope.dimension_count": (8, ["rotation of 8 of 16"]),
            "llama.attention.value_length": (8, ["keys of 16 and values of 8"]),
            "llama.attention.head_count_kv": (3, ["4 heads", "3 KV heads"]),
            "llama.block_count": (3, ["blk.2.attn_norm.weight", "missing"]),
            "llama.embedding_length": (32, ["token_embd.weight", "shape"]),
            "tokenizer.ggml.merges": (["a b", "b x"], ["merges[1]", "b x"]),
            "tokenizer.ggml.eos_token_id": (99, ["eos_token_id = 99"]),
            "tokenizer.ggml.token_type": ([1], ["token_type"]),
        }
        for key, (content, words) in cases.items():
            with self.subTest(key):
                metadata, tensors, _ = tiny_gguf.model("llama")
                metadata[key] = content
                self.assert_refused(metadata, tensors, *words)

    def test_missing_values(self):
        for key in ("llama.block_count", "tokenizer.ggml.tokens", "tokenizer.ggml.pre"):
            with self.subTest(key):
                metadata, tensors, _ = tiny_gguf.model("llama")
                del metadata[key]
                self.assert_refused(metadata, tensors, key, "missing")

    def test_types_and_tensors(self):
        metadata, tensors, _ = tiny_gguf.model("llama")
        shape, _, raw = tensors["blk.0.ffn_up.weight"]
        tensors["blk.0.ffn_up.weight"] = (shape, 10, raw)
        self.assert_refused(metadata, tensors, "Q2_K", "blk.0.ffn_up.weight")
        metadata, tensors, _ = tiny_gguf.model("llama")
        tensors["blk.0.attn_q.bias"] = ([64], 0, bytes(256))
        self.assert_refused(metadata, tensors, "blk.0.attn_q.bias", "llama")
        metadata, tensors, _ = tiny_gguf.model("llama")
        tensors["blk.0.attn_q_norm.weight"] = ([16], 0, bytes(64))
        self.assert_refused(metadata, tensors, "attn_q_norm")

    def test_an_existing_directory_stays(self):
        metadata, tensors, _ = tiny_gguf.model("llama")
        os.makedirs(self.target)
        with open(os.path.join(self.target, "mine"), "w") as file:
            file.write("x")
        with self.assertRaises(ConversionError):
            self.convert(metadata, tensors)
        self.assertEqual(os.listdir(self.target), ["mine"])
        self.convert(metadata, tensors, force=True)
        self.assertNotIn("mine", os.listdir(self.target))
        self.assertEqual(os.listdir(os.path.dirname(self.target)), ["model"])

    def test_checksum(self):
        metadata, tensors, _ = tiny_gguf.model("llama")
        with self.assertRaises(ConversionError) as caught:
            self.convert(metadata, tensors, sha256="0" * 64)
        self.assertIn("wrong checksum", str(caught.exception))
        self.assert_nothing_written()

    def test_an_interruption_leaves_nothing(self):
        metadata, tensors, _ = tiny_gguf.model("llama")
        self.write(metadata, tensors)
        original = convert_gguf.Progress.__call__

        def interrupt(self, done, total):
            raise KeyboardInterrupt

        convert_gguf.Progress.__call__ = interrupt
        self.addCleanup(setattr, convert_gguf.Progress, "__call__", original)
        with self.assertRaises(KeyboardInterrupt):
            convert_gguf.convert(self.source, self.target)
        self.assert_nothing_written()


class CommandLineTest(ConvertTest):
    def run_script(self, *args):
        return subprocess.run(
            [sys.executable, SCRIPT, *args], capture_output=True, text=True, check=False
        )

    def test_exit_codes(self):
        metadata, tensors, _ = tiny_gguf.model("llama")
        self.write(metadata, tensors)
        done = self.run_script(self.source, self.target)
        self.assertEqual((done.returncode, done.stdout), (0, ""))
        self.assertIn("100 %", done.stderr)
        failed = self.run_script(self.source, self.target)
        self.assertEqual(failed.returncode, 2)
        self.assertEqual(len(failed.stderr.splitlines()), 1)
        self.assertIn("exists already", failed.stderr)
        missing = self.run_script(os.path.join(self.dir, "nothing"), self.target)
        self.assertEqual(missing.returncode, 2)
        self.assertIn("No such file", missing.stderr)


if __name__ == "__main__":
    unittest.main()
