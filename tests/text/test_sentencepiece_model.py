"""The oracle is sentencepiece itself, on models that its own trainer makes."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pyserve.errors import CheckpointError
from pyserve.text import sentencepiece_model
from pyserve.text.sentencepiece_model import convert_model
from pyserve.text.tokenizer import Tokenizer
from tests.text import samples

HAS_SENTENCEPIECE = vars(sentencepiece_model)["SentencePieceProcessor"] is not None
needs_sentencepiece = pytest.mark.skipif(
    not HAS_SENTENCEPIECE, reason="needs the packages sentencepiece and protobuf"
)
TEXTS = [
    *samples.TEXTS, "", "a", "a  b", "\n    if", "if x:\n        return y\n    else:\n\n\n  z",
    "a" + " " * 40 + "b", "    x  =  [1,   2]",
]  # fmt: skip
CODE = [
    "def f(x):\n    if x:\n        return  x\n",
    "a  b   c    d     e",
    "x = [1,  2,   3]\n    y",
]
OWN = ["[INST]", "▁▁▁▁", "x_y", "fo", "fox▁", "re"]  # parts of words, and of each other


def train(**options: object) -> Any:
    """A ModelProto: bytes for what the vocabulary lacks, runs of spaces as pieces of their own."""
    from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

    written = io.BytesIO()
    lines = [line for text in (samples.TEXTS[:5] + CODE) * 4 for line in text.splitlines()]
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, minloglevel=2, num_threads=1,
        hard_vocab_limit=False, **{"model_type": "bpe", "vocab_size": 460, "byte_fallback": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True} | options,
    )  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(written.getvalue())
    return model


def with_runs(model: Any) -> Any:
    """Pieces of spaces at the end, with the best scores: where ids rank otherwise than scores."""
    pieces = {piece.piece: piece for piece in model.pieces}
    for length in (8, 4, 2, 3, 16):
        piece = pieces.get("▁" * length) or model.pieces.add(piece="▁" * length, type=1)
        piece.score = 100.0 - length
    return model


def save(folder: Path, model: Any, **config: object) -> Any:
    """Write a folder; returns sentencepiece's own encoder of it."""
    from sentencepiece import SentencePieceProcessor

    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return SentencePieceProcessor(model_proto=model.SerializeToString())


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder, converted=convert_model(folder))


@needs_sentencepiece
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"user_defined_symbols": OWN},
        {"control_symbols": ["<|im_end|>"]},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"model_type": "unigram"},
        {"model_type": "unigram", "byte_fallback": False, "normalization_rule_name": "nfkc"},
    ],
    ids=str,
)
def test_ids_are_those_of_sentencepiece(tmp_path: Path, options: dict[str, object]) -> None:
    model = train(**options)
    if "unigram" not in options.values():
        model = with_runs(model)
    processor = save(tmp_path, model)
    tokenizer = load(tmp_path)
    rng = random.Random(7)
    has_charsmap = "normalization_rule_name" in options  # see the note in sentencepiece_model.py
    skipped = ["</s>", *(["ｶﾞ", "\u0323", "\u0351"] if has_charsmap else [])]
    texts = [text for text in TEXTS if not any(part in text for part in skipped)] + [
        "".join(rng.choices("ab x\n  \t[]é漢", k=30)) for _ in range(200)
    ]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == processor.encode(text), text
        if options.get("byte_fallback", True):
            assert tokenizer.decode(ids, skip_special_tokens=False) == processor.decode(ids)
    assert (tokenizer.special_tokens["bos_token"], tokenizer.eos_token_id) == ("<s>", 2)


@needs_sentencepiece
def test_runs_of_spaces_are_one_token_each(tmp_path: Path) -> None:
    """Merges ranked by the pieces' ids, not by their scores, give pairs of spaces here."""
    processor = save(tmp_path, with_runs(train()))
    tokenizer = load(tmp_path)
    for text, length in [("x        y", 8), ("\n    if", 4), ("a    b", 4)]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == processor.encode(text)
        assert tokenizer.token_to_id("▁" * length) in ids


@needs_sentencepiece
@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, ["</s>", "▁", "a"]),
        ({"legacy": False}, ["</s>", "a"]),
        ({"tokenizer_class": "LlamaTokenizer"}, ["</s>", "a"]),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": True}, ["</s>", "▁", "a"]),
        ({"tokenizer_class": "CodeLlamaTokenizer", "legacy": True}, ["<s>", "</s>", "a"]),
        ({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}, ["</s>", "a"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "</s>", "▁", "a", "</s>"]),
        ({"add_bos_token": True, "bos_token": "</s>"}, ["</s>", "</s>", "▁", "a"]),
    ],
)
def test_fields_of_the_config_count(
    tmp_path: Path, config: dict[str, object], tokens: list[str]
) -> None:
    save(tmp_path, train(), **config)
    tokenizer = load(tmp_path)
    ids = tokenizer.encode("</s>a", add_special_tokens=True)
    assert "".join(tokenizer.id_to_token(i) or "" for i in ids) == "".join(tokens)
    assert len(ids) in (len(tokens), len(tokens) - 1)  # "▁a" may be one


@needs_sentencepiece
def test_added_tokens_are_found_and_contradictions_refused(tmp_path: Path) -> None:
    model = train()
    last = len(model.pieces)
    listed = {"content": "<|im_end|>", "normalized": True, "special": True}
    save(tmp_path, model, added_tokens_decoder={str(last): listed}, eos_token="<|im_end|>")
    tokenizer = load(tmp_path)
    assert tokenizer.eos_token_id == last
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in ("a", " b")]
    ids = tokenizer.encode("a<|im_end|> b", add_special_tokens=False)
    assert ids == [*parts[0], last, *parts[1]]
    save(tmp_path, model, added_tokens_decoder={"2": listed})
    with pytest.raises(CheckpointError, match=r"the id 2 is the token '</s>' in tokenizer.model"):
        load(tmp_path)


@needs_sentencepiece
def test_a_conversion_that_differs_is_refused(tmp_path: Path) -> None:
    """Pieces of equal score: sentencepiece takes the leftmost pair, a list of merges cannot."""
    model = train()
    for piece in model.pieces:
        piece.score = 0.0 if piece.type == 1 else piece.score
    save(tmp_path, model)
    with pytest.raises(
        CheckpointError, match=r"tokenizer.model: .* than sentencepiece for '.*"
    ) as e:
        load(tmp_path)
    assert "--tokenizer names another folder" in str(e.value) and "\n" not in str(e.value)


@needs_sentencepiece
def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    for junk in (b"junk", b"", b"IQ== 0\nIg== 1\n", b"\x0a\xff" * 9):  # the third is tiktoken's
        (tmp_path / "tokenizer.model").write_bytes(junk)
        with pytest.raises(CheckpointError, match=r"tokenizer.model: not a SentencePiece"):
            load(tmp_path)
    model = train()
    model.trainer_spec.model_type = 4  # characters alone
    save(tmp_path, model)
    with pytest.raises(CheckpointError, match=r"tokenizer.model: neither BPE nor Unigram"):
        load(tmp_path)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"any")
    monkeypatch.setattr(sentencepiece_model, "SentencePieceProcessor", None)
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf, or --tokenizer"):
        convert_model(tmp_path)
