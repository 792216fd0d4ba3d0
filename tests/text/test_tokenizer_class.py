"""The oracle is AutoTokenizer: the same ids in each kind of folder that it reads in its own way."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models, processors
from transformers import AutoTokenizer

from pyserve.text.tokenizer import Tokenizer
from tests.text import samples

TEXTS = [
    "", "a", " a", "  two  spaces", "the quick</s> fox", "<s>[INST] hi [/INST] x", "▁a", "e\u0301",
    "<|im_start|>user\nhola<|im_end|>\nx", "def f(x):\n    return 12 345", "<think>a</think> b",
    "<image> b", "a<new1>b <new2> c", "  <new1>  x", "café schöner", "<norm>x <norm>",
]  # fmt: skip
# The classes and model types that go with a kind of vocabulary; the others' classes do not fit it.
CLASSES = {
    "sentencepiece": ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer"],
    "byte_level": ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast"],
}
ANY_CLASS = [None, "PreTrainedTokenizerFast", "TokenizersBackend"]
MODEL_TYPES = {
    "sentencepiece": [None, "llama", "mistral"],
    "byte_level": [None, "llama", "mistral", "qwen2", "qwen3"],
}


@pytest.fixture(scope="module")
def backends() -> dict[str, tokenizers.Tokenizer]:
    return {kind: samples.KINDS[kind]() for kind in ("byte_level", "sentencepiece")}


def save(
    folder: Path, backend: tokenizers.Tokenizer, config: dict[str, Any], model_type: str | None
) -> None:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    model_config = {"vocab_size": 2000} | ({"model_type": model_type} if model_type else {})
    (folder / "config.json").write_text(json.dumps(model_config))


def compare(folder: Path, texts: list[str] = TEXTS) -> Tokenizer:
    ours = Tokenizer.from_folder(folder)
    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    for text in texts:
        for add in (True, False):
            assert ours.encode(text, add_special_tokens=add) == theirs.encode(
                text, add_special_tokens=add
            ), (type(theirs).__name__, text)
    names = {name: str(value) for name, value in theirs.special_tokens_map.items()
             if not isinstance(value, list)}  # fmt: skip
    assert ours.special_tokens == names
    return ours


@pytest.mark.parametrize("model_type", ["llama", None])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"legacy": False},
        {"legacy": True},
        {"legacy": None},
        {"add_prefix_space": False},
        {"add_prefix_space": True, "legacy": True},
        {"add_bos_token": False},
        {"add_bos_token": True, "add_eos_token": True},
    ],
)
def test_llama_tokenizers_follow_their_config(
    tmp_path: Path,
    backends: dict[str, tokenizers.Tokenizer],
    config: dict[str, object],
    model_type: str | None,
) -> None:
    backend = backends["sentencepiece"]
    save(tmp_path, backend, {"tokenizer_class": "LlamaTokenizer"} | config, model_type)
    ours = compare(tmp_path)
    for text, is_legacy in [("</s>x", bool(config.get("legacy"))), (" x", False)]:
        ids = ours.encode(text, add_special_tokens=True)
        assert (ids == backend.encode(text).ids) == is_legacy  # else tokenizer.json does not count
    for text in ("the fox", "  a  b", "x"):
        ids = ours.encode(text, add_special_tokens=False)
        shown = ours.decode(ids, skip_special_tokens=True)
        assert shown == text or shown == text[1:] and text.startswith(" ")


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_tokenizer_json_counts_before_the_bos_flag(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    flag: bool,
    adds: bool,
) -> None:
    """DeepSeek-V3: LlamaTokenizerFast over a byte-level vocabulary, with a flag of its own."""
    backend = samples.byte_level()
    single = ["<s>", "$A"] if adds else ["$A"]
    backend.post_processor = processors.TemplateProcessing(
        single=single, pair=None, special_tokens=[("<s>", 1)] if adds else []
    )
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": flag, "bos_token": "<s>",
              "legacy": True}  # fmt: skip
    save(tmp_path, backend, config, "deepseek_v3")
    with caplog.at_level(logging.WARNING, logger="pyserve"):
        ours = compare(tmp_path)
    assert ours.encode("", add_special_tokens=True) == ([1] if adds else [])
    ours_say = [record.getMessage() for record in caplog.records if record.name == "pyserve"]
    assert len(ours_say) == (flag != adds)
    for message in ours_say:
        assert f"add_bos_token: {json.dumps(flag)}" in message
        assert "tokenizer.json counts" in message


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    ("name", "model_type"),
    [("Qwen2Tokenizer", "qwen2"), ("PreTrainedTokenizerFast", "qwen2"), ("GPT2Tokenizer", "llama"),
     ("PreTrainedTokenizerFast", "llama"), ("GPT2Tokenizer", "mistral"), (None, "qwen3")],
)  # fmt: skip
def test_byte_level_classes_follow_add_prefix_space(
    tmp_path: Path,
    backends: dict[str, tokenizers.Tokenizer],
    name: str | None,
    model_type: str,
    value: bool,
) -> None:
    config = {"add_prefix_space": value} | ({"tokenizer_class": name} if name else {})
    save(tmp_path, backends["byte_level"], config, model_type)
    ours = compare(tmp_path)
    is_own = model_type == "mistral" or (name, model_type) == ("PreTrainedTokenizerFast", "llama")
    with_space = ours.encode(" fox", add_special_tokens=False)
    assert (ours.encode("fox", add_special_tokens=False) == with_space) == (value and not is_own)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "CodeLlamaTokenizer"])
def test_the_class_decides_what_the_model_does_with_the_unknown(tmp_path: Path, name: str) -> None:
    """Whole words that merges do not make, and characters without bytes in the vocabulary."""
    words = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁ab", "ba"]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [("b", "a")], unk_token="<unk>", ignore_merges=True)
    )
    save(tmp_path, backend, {"tokenizer_class": name}, "llama")
    texts = ["ab", "ba", "xx ab", "é"]
    ours = compare(tmp_path, texts)
    assert len(ours.encode("ab", add_special_tokens=False)) == 3
    assert (0 in ours.encode("xx", add_special_tokens=False)) == (name == "CodeLlamaTokenizer")


def test_code_llama_adds_bos_whatever_the_file_says(tmp_path: Path) -> None:
    backend = samples.sentencepiece()
    backend.post_processor = processors.TemplateProcessing(
        single=["$A"], pair=None, special_tokens=[]
    )
    save(tmp_path, backend, {"tokenizer_class": "CodeLlamaTokenizer"}, "llama")
    assert compare(tmp_path).encode("x", add_special_tokens=True)[0] == 1


def test_a_class_that_does_not_fit_the_vocabulary_does_not_count(tmp_path: Path) -> None:
    """transformers splits it into bytes that the vocabulary does not have: no tokens are left."""
    for kind, name in [("sentencepiece", "Qwen2Tokenizer"), ("unigram", "LlamaTokenizer")]:
        backend = samples.KINDS[kind]()
        save(tmp_path, backend, {"tokenizer_class": name}, "llama")
        tokenizer = Tokenizer.from_folder(tmp_path)
        for text in ("the fox", " a  b"):
            assert tokenizer.encode(text, add_special_tokens=True) == backend.encode(text).ids


def test_splitting_special_tokens_is_a_field_of_the_config(
    tmp_path: Path, backends: dict[str, tokenizers.Tokenizer]
) -> None:
    save(tmp_path, backends["byte_level"], {"split_special_tokens": True}, "llama")
    assert 2 not in compare(tmp_path).encode("a</s>", add_special_tokens=False)


def random_folder(
    folder: Path, backends: dict[str, tokenizers.Tokenizer], rng: random.Random
) -> None:
    kind = rng.choice(sorted(backends))
    backend = backends[kind]
    name, model_type = rng.choice([*CLASSES[kind], *ANY_CLASS]), rng.choice(MODEL_TYPES[kind])
    config: dict[str, Any] = {"tokenizer_class": name} if name else {}
    for flag in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"):
        if rng.random() < 0.4:
            config[flag] = rng.choice([True, False])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]",
             "image_token": "<image>"}  # fmt: skip
    for key, text in named.items():
        if rng.random() < 0.6:
            config[key] = rng.choice([text, {"__type": "AddedToken"} | flags_of(text, rng), None])
    if rng.random() < 0.3:
        key = rng.choice(["additional_special_tokens", "extra_special_tokens"])
        config[key] = rng.sample(["<think>", "<new2>", "def"], 2)
    first = backend.get_vocab_size()
    new = {"<new1>": first, "<new2>": first + 1}
    mode = rng.choice(["none", "decoder", "added", "both"])
    if mode in ("decoder", "both"):
        known = [token.content for token in backend.get_added_tokens_decoder().values()]
        ids = {text: backend.token_to_id(text) for text in known} | new
        config["added_tokens_decoder"] = {
            str(id_): flags_of(text, rng) | {"special": rng.random() < 0.5}
            for text, id_ in ids.items()
        }
    if mode in ("added", "both"):
        (folder / "added_tokens.json").write_text(json.dumps(new))
    if rng.random() < 0.4:
        names: dict[str, object] = {"eos_token": rng.choice(["<|im_end|>", flags_of("</s>", rng)])}
        if rng.random() < 0.5:
            names["additional_special_tokens"] = ["<think>", "<new1>"]
        (folder / "special_tokens_map.json").write_text(json.dumps(names))
    save(folder, backend, config, model_type)


def flags_of(text: str, rng: random.Random) -> dict[str, object]:
    flags = {flag: rng.random() < 0.3 for flag in ("lstrip", "rstrip", "normalized")}
    return {"content": text, "single_word": False} | flags


@pytest.mark.parametrize("seed", range(4))
def test_random_folders_give_the_ids_that_transformers_gives(
    tmp_path: Path, backends: dict[str, tokenizers.Tokenizer], seed: int
) -> None:
    rng = random.Random(seed)
    for index in range(40):
        folder = tmp_path / str(index)
        folder.mkdir()
        random_folder(folder, backends, rng)
        compare(folder)
