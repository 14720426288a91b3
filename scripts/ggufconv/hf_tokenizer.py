"""tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json."""

# The cuts made before BPE, by the name in tokenizer.ggml.pre.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(use_regex, trim_offsets=True):
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    }


def _split(regex):
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(False)]}


_GPT2 = {"pre_tokenizer": _byte_level(True)}
_DIGITS = {
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
    }
}
_BY_LLAMA3 = {"pre_tokenizer": _split(_LLAMA3), "ignore_merges": True, "add_bos": True}
_BY_QWEN2 = {"pre_tokenizer": _split(_QWEN2), "normalizer": {"type": "NFC"}}

_PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "codeshell": _DIGITS,
    "llama-bpe": _BY_LLAMA3,
    "llama3": _BY_LLAMA3,
    "llama-v3": _BY_LLAMA3,
    "qwen2": _BY_QWEN2,
}

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

# Control tokens that end an answer whatever tokenizer.ggml.eos_token_id says.
_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


class HfTokenizer:
    """The tokenizer's files as dicts: `tokenizer`, `tokenizer_config`, `special_tokens_map`,
    `generation_config`; and `chat_template`, a string or None."""

    def __init__(self, gguf, context):
        self._gguf = gguf
        self._context = context
        model = self._get("model", str)
        if model != "gpt2":
            kind = "SentencePiece" if model == "llama" else f"'{model}'"
            raise gguf.error(f"a {kind} vocabulary (tokenizer.ggml.model = {model}) is not converted, only byte-level BPE ('gpt2')")
        pre = self._get("pre", str)
        if pre not in _PRE_TOKENIZERS:
            known = ", ".join(_PRE_TOKENIZERS)
            raise gguf.error(f"the pre-tokenizer tokenizer.ggml.pre = '{pre}' is not converted (only {known})")
        self._rules = _PRE_TOKENIZERS[pre]
        self._read_tokens()
        self._read_merges()
        self.chat_template = self._get("chat_template", str, "", prefix="tokenizer.") or None
        self.add_bos = self._get("add_bos_token", bool, self._rules.get("add_bos", False))
        if self._get("add_eos_token", bool, False):
            raise gguf.error("tokenizer.ggml.add_eos_token = True is not converted")
        self._bos, self._eos = self._token_id("bos"), self._token_id("eos")
        self._unk, self._pad = self._token_id("unknown"), self._token_id("padding")
        if self.add_bos and self._bos is None:
            raise gguf.error("tokenizer.ggml.add_bos_token is true, but there is no bos_token_id")
        self.tokenizer = self._tokenizer()
        self.special_tokens_map = self._special_tokens_map()
        self.tokenizer_config = self._tokenizer_config()
        self.generation_config = self._generation_config()

    def _get(self, key, kind, default=None, prefix="tokenizer.ggml."):
        value = self._gguf.metadata.get(prefix + key, default)
        if value is None:
            raise self._gguf.error(f"the metadata value '{prefix}{key}' is missing")
        if not isinstance(value, kind):
            raise self._gguf.error(f"{prefix}{key} is not the {kind.__name__} that it should be")
        return value

    def _token_id(self, name):
        key = f"{name}_token_id"
        value = self._gguf.metadata.get("tokenizer.ggml." + key)
        if value is None:
            return None
        if not isinstance(value, int) or not 0 <= value < len(self._tokens):
            raise self._gguf.error(f"tokenizer.ggml.{key} = {value} is outside [0, {len(self._tokens)})")
        return value

    def _read_tokens(self):
        self._tokens = tokens = self._get("tokens", list)
        types = self._get("token_type", list, [_NORMAL] * len(tokens))
        if not tokens or not all(isinstance(token, str) and token for token in tokens):
            raise self._gguf.error("tokenizer.ggml.tokens is no list of texts")
        if len(types) != len(tokens):
            raise self._gguf.error(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
        rows = self._gguf.tensors["token_embd.weight"].shape[0]
        if len(tokens) > rows:
            raise self._gguf.error(f"tokenizer.ggml.tokens has {len(tokens)} entries for {rows} embeddings")
        ordinary, added = {}, {}
        for i, (token, kind) in enumerate(zip(tokens, types)):
            if kind == _UNUSED:
                continue  # a row of the embedding that no text gives
            if kind not in (_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED):
                what = "a byte of a SentencePiece vocabulary" if kind == _BYTE else "unknown"
                raise self._gguf.error(f"token {i} has the type {kind} ({what}), which is not converted")
            place = ordinary if kind == _NORMAL else added
            if token in ordinary or token in added:
                raise self._gguf.error(f"token '{token}' occurs twice, the second time as {i}")
            place[token] = i
        self._added = {i: (token, types[i] != _USER_DEFINED) for token, i in added.items()}
        # `tokenizers` numbers added tokens after the vocabulary; where that gives other ids
        # (GPT-2-like vocabularies begin with them) they are part of the vocabulary too.
        self._vocab = dict(ordinary)
        if [*ordinary.values(), *added.values()] != list(range(len(ordinary) + len(added))):
            self._vocab = {token: i for i, token in enumerate(tokens) if token in ordinary or token in added}

    def _read_merges(self):
        self._merges = self._get("merges", list)
        vocab = self._vocab
        for i, merge in enumerate(self._merges):
            left, _, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
            if left not in vocab or right not in vocab or left + right not in vocab:
                raise self._gguf.error(f"tokenizer.ggml.merges[{i}] = '{merge}' does not join two tokens to a third")

    def _added_token(self, token, special):
        return {
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": special,
        }

    def _tokenizer(self):
        post_processor = None
        if self.add_bos:
            bos = {"SpecialToken": {"id": self._tokens[self._bos], "type_id": 0}}
            first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
            second_bos = {"SpecialToken": {"id": self._tokens[self._bos], "type_id": 1}}
            post_processor = {
                "type": "TemplateProcessing",
                "single": [bos, first],
                "pair": [bos, first, second_bos, second],
                "special_tokens": {
                    self._tokens[self._bos]: {
                        "id": self._tokens[self._bos],
                        "ids": [self._bos],
                        "tokens": [self._tokens[self._bos]],
                    }
                },
            }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, **self._added_token(*self._added[i])} for i in sorted(self._added)
            ],
            "normalizer": self._rules.get("normalizer"),
            "pre_tokenizer": self._rules["pre_tokenizer"],
            "post_processor": post_processor,
            "decoder": _byte_level(True),
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": self._rules.get("ignore_merges", False),
                "vocab": self._vocab,
                "merges": self._merges,
            },
        }

    def _special_tokens_map(self):
        names = {"bos": self._bos, "eos": self._eos, "unk": self._unk, "pad": self._pad}
        return {f"{name}_token": self._tokens[i] for name, i in names.items() if i is not None}

    def _tokenizer_config(self):
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._context,
            "added_tokens_decoder": {
                str(i): self._added_token(*self._added[i]) for i in sorted(self._added)
            },
            **self.special_tokens_map,
        }
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        return config

    def _generation_config(self):
        ends = [self._eos, self._token_id("eot"), self._token_id("eom")]
        control = {token: i for i, (token, special) in self._added.items() if special}
        ends += [control.get(token) for token in _END_TOKENS]
        config = {}
        if self._bos is not None:
            config["bos_token_id"] = self._bos
        config["eos_token_id"] = list(dict.fromkeys(i for i in ends if i is not None))
        if self._pad is not None:
            config["pad_token_id"] = self._pad
        return config
