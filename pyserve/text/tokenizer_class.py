"""The tokenizer class with which transformers 5 loads a folder, and what that class changes.

Most folders are read as their tokenizer.json says. Some classes, however, take only vocabulary,
merges and post-processor from it. They build the rest themselves from tokenizer_config.json: the
fields `legacy` and `add_prefix_space` apply, and special tokens have default names. The fields
`add_bos_token` and `add_eos_token` apply only in a folder without tokenizer.json.

Source: AutoTokenizer and the tokenization modules of transformers 5.24, which the tests compare
with. If such a class does not fit the kind of vocabulary in tokenizer.json, the file is read as it
is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors

from pyserve import log

Config = Mapping[str, Any]

# Model types for which transformers ignores the class that a folder declares.
_READ_AS_IT_IS = ("mistral", "mixtral", "phi3")
_ALWAYS_QWEN = ("qwen2",)
_QWEN_UNLESS_DECLARED = ("qwen3",)

_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class TokenizerClass:
    """A class of transformers that builds its tokenizer itself.

    rebuild             replaces the parts of a tokenizer that the class does not take from
                        tokenizer.json.
    is_byte_level       whether the class fits a byte-level vocabulary, or else a SentencePiece one.
    defaults            special tokens that the class names where the config does not: name ->
                        string.
    has_bos             whether the class adds BOS, whatever the file says; None: as the file says.
    is_special_by_name  whether all tokens that the config names or lists become special tokens.
    prefix              returns where the class puts a space, as in `prefix_of`.
    """

    rebuild: Callable[[tokenizers.Tokenizer, Config], None]
    is_byte_level: bool
    defaults: Mapping[str, str] = field(default_factory=dict)
    has_bos: bool | None = None
    is_special_by_name: bool = False
    prefix: Callable[[Config], str] = lambda config: "never"


def class_of(config: Config, model_config: Config, *, is_byte_level: bool) -> TokenizerClass | None:
    """The class for a folder, by tokenizer_config.json and config.json; None if the folder's
    tokenizer is used as it is.

    is_byte_level  whether tokenizer.json, or what replaces it, has the byte-level alphabet.
    """
    declared = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    name = declared.removesuffix("Fast") if isinstance(declared, str) else None
    model_type = model_config.get("model_type")
    if model_type in _READ_AS_IT_IS:
        return None
    if model_type in _ALWAYS_QWEN or (name is None and model_type in _QWEN_UNLESS_DECLARED):
        name = "Qwen2Tokenizer"
    found = _CLASSES.get(name or "")
    return found if found is not None and found.is_byte_level == is_byte_level else None


def prefix_of(config: Config, model_config: Config) -> str:
    """Where a SentencePiece tokenizer puts a space, as Metaspace's `prepend_scheme`: "always"
    before each text between special tokens, "first" before the first one only, "never".
    """
    found = class_of(config, model_config, is_byte_level=False)
    if found is None:
        return "always" if config.get("legacy", True) else "first"
    return found.prefix(config)


def set_surroundings(
    backend: tokenizers.Tokenizer, *, bos: str | None = None, eos: str | None = None
) -> None:
    """Put these tokens around each text; nothing for None, or for a token without an id."""
    ids = {token: backend.token_to_id(token) for token in (bos, eos) if token}
    before, behind = ([token] if ids.get(token or "") is not None else [] for token in (bos, eos))
    single = [*before, "$A", *behind]
    backend.post_processor = processors.TemplateProcessing(
        single=single,
        pair=[*single, "$B:1"],
        special_tokens=[(token, id_) for token, id_ in ids.items() if id_ is not None],
    )


def warn_of_flags(backend: tokenizers.Tokenizer, config: Config, names: Mapping[str, str]) -> None:
    """Log a warning for each flag of tokenizer_config.json that tokenizer.json contradicts."""
    around = backend.encode("", add_special_tokens=True).ids
    for end in ("bos", "eos"):
        flag, token = config.get(f"add_{end}_token"), names.get(f"{end}_token", "")
        is_added = backend.token_to_id(token) in around
        if isinstance(flag, bool) and flag != is_added:
            log.get_logger().warning(
                "tokenizer_config.json says add_%s_token: %s, and tokenizer.json %s %s; "
                "tokenizer.json counts, as in transformers 5",
                end, json.dumps(flag), "adds" if is_added else "does not add", token or "one",
            )  # fmt: skip


def _has_prefix(config: Config) -> bool:
    return config.get("add_prefix_space") in (None, True)


def _llama_prefix(config: Config) -> str:
    if not _has_prefix(config):
        return "never"
    return "always" if config.get("legacy") else "first"


def _code_llama_prefix(config: Config) -> str:
    return "first" if _has_prefix(config) else "never"


def _as_llama(backend: tokenizers.Tokenizer, config: Config) -> None:
    _set_words(backend, _llama_prefix(config), is_stripped=_has_prefix(config), unk_token=None)


def _as_code_llama(backend: tokenizers.Tokenizer, config: Config) -> None:
    unk_token = str(config.get("unk_token") or "<unk>")
    _set_words(backend, _code_llama_prefix(config), is_stripped=True, unk_token=unk_token)


def _set_words(
    backend: tokenizers.Tokenizer, scheme: str, *, is_stripped: bool, unk_token: str | None
) -> None:
    """Set up a SentencePiece vocabulary: "▁" for spaces, bytes for unknown characters."""
    _set_model(backend, unk_token=unk_token, fuse_unk=True, byte_fallback=True)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(
        [*steps, *([decoders.Strip(" ", 1, 0)] if is_stripped else [])]
    )


def _as_qwen(backend: tokenizers.Tokenizer, config: Config) -> None:
    _set_model(backend, unk_token=None, fuse_unk=False, byte_fallback=False)
    backend.normalizer = normalizers.NFC()
    has_prefix = bool(config.get("add_prefix_space"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=has_prefix, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()


def _as_gpt2(backend: tokenizers.Tokenizer, config: Config) -> None:
    _set_model(backend, unk_token=None, fuse_unk=False, byte_fallback=False)
    backend.normalizer = None
    has_prefix = bool(config.get("add_prefix_space"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix)
    backend.decoder = decoders.ByteLevel()


def _set_model(
    backend: tokenizers.Tokenizer, *, unk_token: str | None, fuse_unk: bool, byte_fallback: bool
) -> None:
    model = backend.model
    model.dropout = None
    model.unk_token = unk_token
    model.fuse_unk = fuse_unk
    model.byte_fallback = byte_fallback
    model.ignore_merges = False


_LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_CODE_NAMES = {
    "prefix_token": "▁<PRE>", "middle_token": "▁<MID>", "suffix_token": "▁<SUF>",
    "eot_token": "▁<EOT>", "fill_token": "<FILL_ME>",
}  # fmt: skip
_END_OF_TEXT = "<|endoftext|>"

_CLASSES = {
    "LlamaTokenizer": TokenizerClass(_as_llama, False, _LLAMA_NAMES, prefix=_llama_prefix),
    "CodeLlamaTokenizer": TokenizerClass(
        _as_code_llama, False, _LLAMA_NAMES | _CODE_NAMES, has_bos=True, prefix=_code_llama_prefix
    ),
    "Qwen2Tokenizer": TokenizerClass(
        _as_qwen,
        True,
        dict.fromkeys(("eos_token", "unk_token", "pad_token"), _END_OF_TEXT),
        is_special_by_name=True,
    ),
    "GPT2Tokenizer": TokenizerClass(
        _as_gpt2, True, dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT)
    ),
}
