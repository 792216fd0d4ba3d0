"""Files on which the `tokenizers` library panics, hangs or fills memory are refused by section."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from pyserve.errors import CheckpointError
from pyserve.text.tokenizer import Tokenizer
from tests.text import samples


def charsmap(content: bytes) -> dict[str, Any]:
    text = base64.b64encode(content).decode()
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def template(single: list[Any]) -> dict[str, Any]:
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}]
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    return {"post_processor": {
        "type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special
    }}  # fmt: skip


def bpe(**changes: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    return {"model": model | changes, "added_tokens": []}


A = {"Sequence": {"id": "A", "type_id": 0}}
BOS, NOWHERE = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("<s>", "<nowhere>"))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # Panics when it is read.
    "charsmap of garbage": ("normalizer", charsmap(b"garbage bytes here!")),
    "charsmap beyond its end": ("normalizer", charsmap(b"\xff\xff\xff\x7f" + b"a" * 64)),
    "charsmap of null": ("normalizer", {"normalizer": {
        "type": "Precompiled", "precompiled_charsmap": None}}),
    "prefix longer than a piece": ("model", bpe(continuing_subword_prefix="xxx")),
    "prefix of two letters": ("model", bpe(continuing_subword_prefix="éé")),
    # At the first text.
    "charsmap without a table": ("normalizer", charsmap(b"\0" * 4)),
    "charsmap of nonsense": ("normalizer", charsmap(b"\0\4\0\0" + b"\xff" * 1024 + b"abc")),
    "an empty match": ("normalizer", {"normalizer": replace({"Regex": ""}, "x")}),
    "an empty text": ("normalizer", {"normalizer": replace({"String": ""}, "x")}),
    "an empty beginning": ("normalizer", {"normalizer": {"type": "Prepend", "prepend": ""}}),
    "pieces of no length": ("pre_tokenizer", {"pre_tokenizer": {
        "type": "FixedLength", "length": 0}}),
    "a token that is not there": ("post_processor", template([NOWHERE, A])),
    "a second text": ("post_processor", template([{"Sequence": {"id": "B", "type_id": 0}}])),
    # No panic, but worse.
    "no text": ("post_processor", template([BOS])),
    "the text 2000 times": ("post_processor", template([A] * 2000)),
    "a bomb": ("normalizer", {"normalizer": {
        "type": "Sequence", "normalizers": [replace({"String": "l"}, "ll")] * 40}}),
    "a large one": ("normalizer", {"normalizer": replace({"String": "l"}, "y" * 10**7)}),
    "a long beginning": ("normalizer", {"normalizer": {"type": "Prepend", "prepend": "x" * 10**6}}),
    "a bomb behind": ("decoder", {"decoder": {
        "type": "Sequence", "decoders": [replace({"String": "o"}, "oo")] * 60}}),
    # Refused by the library.
    "no regular expression": ("pre_tokenizer", {"pre_tokenizer": {
        "type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}}),
    "an id beyond 32 bits": ("model", bpe(vocab={"a": 2**40})),
}  # fmt: skip


@pytest.mark.parametrize(("section", "changes"), CASES.values(), ids=CASES.keys())
def test_it_is_refused_with_file_and_section(
    section: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = samples.save(samples.byte_level(), tmp_path) / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError) as refusal:
        Tokenizer.from_folder(tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and section in message
    assert "\n" not in message and len(message) < 600


def test_padding_to_a_length_that_no_memory_has_is_not_looked_at(tmp_path: Path) -> None:
    """The library would end the process by it, at the first text."""
    path = samples.save(samples.byte_level(), tmp_path) / "tokenizer.json"
    padding = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_to_multiple_of": None,
               "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding": padding}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert len(tokenizer.encode("a", add_special_tokens=False)) == 1


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("tokenizer_config.json", '{"bos_token": "\\ud800"}', "bos_token"),
        ("tokenizer_config.json", '{"extra_special_tokens": ["\\ud800"]}', "extra_special_tokens"),
        ("special_tokens_map.json", '{"eos_token": {"content": "\\ud800"}}', "eos_token"),
        ("added_tokens.json", '{"\\ud800": 3}', "a key"),
        ("added_tokens.json", '{"x": 1e999}', "x"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 1e999}}', "added_tokens_decoder"),
    ],
)
def test_files_beside_it_are_refused_with_file_and_field(
    name: str, content: str, field: str, tmp_path: Path
) -> None:
    samples.save(samples.byte_level(), tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError) as refusal:
        Tokenizer.from_folder(tmp_path)
    assert f"{name}: " in str(refusal.value) and field in str(refusal.value)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600
