from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import models

from pyserve.errors import CheckpointError, InvalidRequestError
from pyserve.text.grammar_vocabulary import Vocabulary
from pyserve.text.guard import ChatPrompt
from pyserve.text.tokenizer import MAX_EOS_IDS, MAX_TOKEN_BYTES, GenerationDefaults, Tokenizer
from tests.text import samples


def test_encode_equals_the_library(tokenizer: Tokenizer) -> None:
    backend = samples.backend_of(tokenizer)
    for text in samples.TEXTS:
        for add in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=add)
            assert ids == backend.encode(text, add_special_tokens=add).ids
        assert tokenizer.encode_chat(text) == backend.encode(text, add_special_tokens=False).ids


def test_round_trip(byte_level: Tokenizer, sentencepiece: Tokenizer) -> None:
    for tokenizer in (byte_level, sentencepiece):
        for text in samples.TEXTS:
            if tokenizer is sentencepiece and "▁" in text:
                text = text.replace("▁", "_")  # reads as a space in that kind of vocabulary
            if tokenizer is sentencepiece and "<0x" in text:
                continue
            ids = tokenizer.encode(text, add_special_tokens=True)
            assert tokenizer.decode(ids, skip_special_tokens="<" not in text) == text


def test_special_tokens_and_ids(sentencepiece: Tokenizer) -> None:
    assert sentencepiece.special_tokens == {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    }  # fmt: skip
    assert (sentencepiece.token_to_id("<s>"), sentencepiece.eos_token_id) == (1, 2)
    assert sentencepiece.special_token_ids == frozenset(range(5))
    assert sentencepiece.control_tokens == frozenset(samples.SPECIAL_TOKENS)
    word = sentencepiece.token_to_id(samples.WORD)
    assert word is not None and word not in sentencepiece.special_token_ids
    tokens = [sentencepiece.id_to_token(token_id) for token_id in (1, word, 10**9, -1)]
    assert tokens == ["<s>", samples.WORD, None, None]
    assert sentencepiece.vocab_size == word + 1
    assert sentencepiece.encode("a", add_special_tokens=True)[0] == 1
    assert sentencepiece.encode("<s>a", add_special_tokens=False)[0] == 1  # parsed in a prompt


def test_config_names_special_tokens_that_tokenizer_json_does_not(tmp_path: Path) -> None:
    samples.save(
        samples.byte_level(),
        tmp_path,
        eos_token={"content": samples.WORD},
        pad_token="[PAD]",  # has no id: gets none, it would lie beyond the model's embedding
        additional_special_tokens=["def"],
        extra_special_tokens={"image_token": "<unk>"},
    )
    before = samples.byte_level().get_vocab_size()
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.eos_token_id == tokenizer.token_to_id(samples.WORD)
    assert tokenizer.eos_token_id in tokenizer.special_token_ids
    assert tokenizer.token_to_id("[PAD]") is None
    assert tokenizer.vocab_size == before
    assert tokenizer.special_tokens["image_token"] == "<unk>"
    assert {samples.WORD, "def"} <= tokenizer.control_tokens
    ids = tokenizer.encode(f"a{samples.WORD}", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a"


def test_truncation_and_padding_left_by_training_are_off(tmp_path: Path) -> None:
    backend = samples.byte_level()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=16, pad_token="<unk>")
    tokenizer = Tokenizer.from_folder(samples.save(backend, tmp_path))
    assert 4 < len(tokenizer.encode("a b c d e f", add_special_tokens=False)) < 16


def test_dropout_left_by_training_is_off(tmp_path: Path) -> None:
    folder = samples.save(samples.byte_level(), tmp_path)
    text = "the quick brown fox jumps over the lazy dog"
    ids = Tokenizer.from_folder(folder).encode(text, add_special_tokens=False)
    stated = json.loads((folder / "tokenizer.json").read_text())
    stated["model"]["dropout"] = 0.9
    write(folder, "tokenizer.json", stated)
    assert Tokenizer.from_folder(folder).encode(text, add_special_tokens=False) == ids


@pytest.mark.parametrize("char", ["<", "\u4e2d"])
def test_a_token_of_absurd_length_is_refused(char: str, tmp_path: Path) -> None:
    num_chars = MAX_TOKEN_BYTES // len(char.encode())
    backend = samples.byte_level()
    backend.add_special_tokens([num_chars * char])
    folder = samples.save(backend, tmp_path)
    tokenizer = Tokenizer.from_folder(folder)
    size = backend.get_vocab_size()
    vocabulary = Vocabulary(tokenizer, vocab_size=size, eos_token_ids=[size - 2])
    vocabulary.table()  # the library has not panicked
    backend.add_tokens([(num_chars + 1) * char])
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"has 100\d bytes, the limit is 1000") as refusal:
        Tokenizer.from_folder(folder)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff tail", "\ud83d\ude00"])
def test_lone_surrogates_are_the_clients_fault(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"prompt is not Unicode text.*U\+D") as caught:
        tokenizer.encode(text, add_special_tokens=True)
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequestError, match="messages is not Unicode") as caught:
        tokenizer.encode_chat(text)
    assert caught.value.param == "messages"


def test_text_without_tokens_is_the_clients_fault(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="[none]"))
    tokenizer = Tokenizer.from_folder(samples.save(backend, tmp_path))
    with pytest.raises(InvalidRequestError, match="no tokens for"):
        tokenizer.encode("b", add_special_tokens=False)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer.json; --tokenizer names"):
        Tokenizer.from_folder(tmp_path)
    good = samples.save(samples.byte_level(), tmp_path) / "tokenizer.json"
    text = good.read_text()
    for broken in ("", "{}", "[]", text[:-20], "\x00" * 9, '{"model": {"type": "Magic"}}'):
        good.write_text(broken)
        with pytest.raises(CheckpointError, match=r"tokenizer.json: tokenizers .* cannot read it"):
            Tokenizer.from_folder(tmp_path)
    good.write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: is not UTF-8"):
        Tokenizer.from_folder(tmp_path)
    good.write_text(text)
    config = tmp_path / "tokenizer_config.json"
    for broken, says in [("{", "not JSON"), ("[1]", "JSON object, not list"),
                         ("[" * 100_000, "not JSON")]:  # fmt: skip
        config.write_text(broken)
        with pytest.raises(CheckpointError, match=rf"tokenizer_config.json: .*{says}"):
            Tokenizer.from_folder(tmp_path)


def test_byte_order_marks_are_skipped(tmp_path: Path) -> None:
    samples.save(samples.byte_level(), tmp_path, add_bos_token=True)
    plain = Tokenizer.from_folder(tmp_path)
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    marked = Tokenizer.from_folder(tmp_path)
    assert marked.config == plain.config and marked.special_tokens == plain.special_tokens
    ids = plain.encode("Hello wörld", add_special_tokens=True)
    assert marked.encode("Hello wörld", add_special_tokens=True) == ids


def test_a_damaged_tokenizer_never_escapes_as_another_error(tmp_path: Path) -> None:
    good = samples.save(samples.byte_level(), tmp_path) / "tokenizer.json"
    text = good.read_text()
    rng = random.Random(6)
    num_refused = 0
    for _ in range(60):
        at = rng.randrange(len(text))
        good.write_text(text[:at] + rng.choice(['"', "}", "9", "null", "\\", ","]) + text[at + 1 :])
        try:
            Tokenizer.from_folder(tmp_path).encode("a b", add_special_tokens=True)
        except (CheckpointError, InvalidRequestError):
            num_refused += 1
    assert num_refused > 10


def test_encoding_from_many_threads(tokenizer: Tokenizer) -> None:
    expected = [tokenizer.encode(text * 20, add_special_tokens=True) for text in samples.TEXTS]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            results = pool.map(
                lambda text: tokenizer.encode(text * 20, add_special_tokens=True), samples.TEXTS
            )
            assert list(results) == expected


def test_breaks_keep_control_tokens_out(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nsay <|im_end|> and </s><|im_end|>\n"
    inner = text.index("<|im_end|>"), text.index("</s>")
    ids = tokenizer.encode_chat(ChatPrompt(text, tuple(at + 1 for at in inner)))
    control = [i for i in ids if i in tokenizer.special_token_ids]
    unk_id = tokenizer.token_to_id("<unk>")
    assert [tokenizer.id_to_token(i) for i in control if i != unk_id] == [
        "<|im_start|>", "<|im_end|>",
    ]  # fmt: skip
    if unk_id not in ids:
        shown = tokenizer.decode(ids, skip_special_tokens=False)
        assert shown.replace(" ", "") == text.replace(" ", "")
        assert "say <|im_end|> and </s><|im_end|>" in shown  # no space slips in at a cut


def test_special_tokens_around_a_chat(tokenizer: Tokenizer, sentencepiece: Tokenizer) -> None:
    """The same around a prompt with breaks, where the tokenizer cannot do it itself."""
    for text in ("<|im_start|>user\nhi", "a"):
        plain = tokenizer.encode_chat(ChatPrompt(text))
        full = tokenizer.encode_chat(ChatPrompt(text), add_special_tokens=True)
        assert full == tokenizer.encode(text, add_special_tokens=True)
        at = next(i for i in range(len(full)) if full[i : i + len(plain)] == plain)
        cut = ChatPrompt("say </s> so", (6,))
        before, after = full[:at], full[at + len(plain) :]
        assert tokenizer.encode_chat(cut, add_special_tokens=True) == [
            *before, *tokenizer.encode_chat(cut), *after,
        ]  # fmt: skip
        assert before == [1] or tokenizer is not sentencepiece


def test_ids_may_have_gaps(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "bcd": 9}, []))
    folder = samples.save(backend, tmp_path)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size == 10
    assert tokenizer.id_to_token(9) == "bcd" and tokenizer.id_to_token(5) is None


class PanicException(BaseException):
    """As the one that pyo3 raises where Rust panics."""


@pytest.mark.parametrize(
    ("raised", "seen"), [(PanicException, RuntimeError), (KeyboardInterrupt, KeyboardInterrupt)]
)
def test_a_panic_is_an_ordinary_error(
    byte_level: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    raised: type[BaseException],
    seen: type[BaseException],
) -> None:
    class Backend:
        def encode_batch_fast(self, texts: list[str], *, add_special_tokens: bool) -> None:
            raise raised("boom")

    monkeypatch.setattr(byte_level, "_backend", Backend())
    with pytest.raises(seen):
        byte_level.encode("x", add_special_tokens=True)


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value))


def test_generation_defaults(tmp_path: Path) -> None:
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults()
    write(tmp_path, "config.json", {"text_config": {"eos_token_id": [5, 6]}})
    assert GenerationDefaults.from_folder(tmp_path).eos_token_ids == (5, 6)
    write(tmp_path, "config.json", {"eos_token_id": 7, "text_config": {"eos_token_id": 6}})
    assert GenerationDefaults.from_folder(tmp_path).eos_token_ids == (7,)
    values: dict[str, Any] = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05,
              "repetition_penalty": 1.05, "max_new_tokens": 2048}  # fmt: skip
    eos = {"eos_token_id": [9, 8, 9], "do_sample": True, "transformers_version": "4.51.0"}
    write(tmp_path, "generation_config.json", values | eos)
    defaults = GenerationDefaults.from_folder(tmp_path)
    assert defaults == GenerationDefaults(**values, eos_token_ids=(9, 8))
    only_eos = GenerationDefaults.from_folder(tmp_path, has_sampling=False)
    assert only_eos == GenerationDefaults(eos_token_ids=(9, 8))
    write(tmp_path, "generation_config.json", {"top_k": -1, "temperature": None})
    assert GenerationDefaults.from_folder(tmp_path) == GenerationDefaults(
        top_k=0, eos_token_ids=(7,)
    )


def test_more_eos_ids_than_a_request_may_stop_at(tmp_path: Path) -> None:
    most = list(range(MAX_EOS_IDS))
    write(tmp_path, "generation_config.json", {"eos_token_id": [*most, 0]})
    assert len(GenerationDefaults.from_folder(tmp_path).eos_token_ids) == MAX_EOS_IDS == 63
    for name in ("generation_config.json", "config.json"):
        write(tmp_path, name, {"eos_token_id": [*most, 63]})
        with pytest.raises(CheckpointError, match=f"{name}: eos_token_id has 64 ids, .* is 63"):
            GenerationDefaults.from_folder(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1), ("temperature", "hot"), ("temperature", float("nan")),
        ("top_p", 0), ("top_p", True), ("top_k", 1.5), ("top_k", -2), ("min_p", 2),
        ("repetition_penalty", 0), ("max_new_tokens", 0),
        ("eos_token_id", "x"), ("eos_token_id", [1, -1]), ("eos_token_id", [True]),
        ("eos_token_id", 2**31), ("eos_token_id", float("inf")), ("top_p", float("inf")),
        ("top_k", 10**400), ("temperature", 10**400), ("max_new_tokens", 2**64),
        ("min_p", "x" * 10**5), ("eos_token_id", ["x" * 10**5]),
    ],
)  # fmt: skip
def test_bad_generation_defaults_name_file_field_and_remedy(
    tmp_path: Path, name: str, value: object
) -> None:
    write(tmp_path, "generation_config.json", {name: value})
    with pytest.raises(
        CheckpointError, match=rf"generation_config.json: {name} must be"
    ) as refusal:
        GenerationDefaults.from_folder(tmp_path)
    assert len(str(refusal.value)) < 400
    if name != "eos_token_id":
        GenerationDefaults.from_folder(tmp_path, has_sampling=False)
