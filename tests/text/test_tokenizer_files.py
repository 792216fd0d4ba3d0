from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, processors
from transformers import AutoTokenizer

from pyserve.errors import CheckpointError
from pyserve.text.tokenizer import Tokenizer
from tests.text import samples

END = "<|end_of_turn|>"


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """tokenizer.json alone; its last id is 704."""
    samples.byte_level().save(str(tmp_path / "tokenizer.json"))
    assert samples.byte_level().get_vocab_size() == 706
    return tmp_path


def token(text: str, **flags: bool) -> dict[str, object]:
    return {"content": text, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True} | flags  # fmt: skip


def oracle(folder: Path) -> tokenizers.Tokenizer:
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"eos_token": END, "added_tokens_decoder": {"706": token(END)}}},
        {"tokenizer_config.json": {"eos_token": END}, "added_tokens.json": {END: 706}},
        {"special_tokens_map.json": {"eos_token": END}, "added_tokens.json": {END: 706}},
        {"special_tokens_map.json": {"eos_token": token(END)}, "config.json": {"vocab_size": 707}},
    ],
)
def test_a_marker_that_tokenizer_json_lacks_is_one_token_and_ends_answers(
    folder: Path, files: dict[str, object]
) -> None:
    for name, value in files.items():
        write(folder, name, value)
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.eos_token_id, tokenizer.vocab_size) == (706, 707)
    text = f"user: the fox{END}\nassistant:"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(706) == 1
    assert ids == oracle(folder).encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert END in tokenizer.control_tokens
    assert END not in tokenizer.decode(ids, skip_special_tokens=True)


def test_the_older_map_counts_only_where_the_config_lists_no_tokens(folder: Path) -> None:
    write(folder, "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    write(folder, "tokenizer_config.json", {"eos_token": "</s>"})
    assert Tokenizer.from_folder(folder).special_tokens["eos_token"] == "<|im_end|>"
    write(folder, "tokenizer_config.json", {"eos_token": "</s>", "added_tokens_decoder": {}})
    assert Tokenizer.from_folder(folder).special_tokens["eos_token"] == "</s>"
    loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    assert loaded.eos_token == "</s>"


def test_flags_of_a_listed_token_count(folder: Path) -> None:
    """lstrip takes the spaces before the token away; it is not a special one."""
    listed = {"706": token("<tool>", lstrip=True, special=False)}
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": listed})
    tokenizer = Tokenizer.from_folder(folder)
    ids = tokenizer.encode("a   <tool>", add_special_tokens=False)
    assert ids == oracle(folder).encode("a   <tool>").ids
    assert len(ids) == 2 and 706 not in tokenizer.special_token_ids


CONFIG = "tokenizer_config.json (added_tokens_decoder)"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"709": token("</s>")}}},
            f"tokenizer.json gives the token '</s>' the id 2, {CONFIG} the id 709",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"2": token(END)}}},
            f"the id 2 is the token '</s>' in tokenizer.json and '{END}' in {CONFIG}",
        ),
        (
            {"added_tokens.json": {"<think>": 900}},
            "tokenizer.json gives the token '<think>' the id 700, added_tokens.json the id 900",
        ),
        (
            {"added_tokens.json": {END: 706},
             "tokenizer_config.json": {"added_tokens_decoder": {"706": token("<pad>")}}},
            f"the id 706 is the token '<pad>' in {CONFIG} and '{END}' in added_tokens.json",
        ),
        (
            {"added_tokens.json": {END: 707},
             "tokenizer_config.json": {"added_tokens_decoder": {"706": token(END)}}},
            f"{CONFIG} gives the token '{END}' the id 706, added_tokens.json the id 707",
        ),
        (
            {"added_tokens.json": {"<a>": 706, "<b>": 706}},
            "the id 706 is the token '<a>' in added_tokens.json and '<b>' in added_tokens.json",
        ),
        (
            {"added_tokens.json": {END: 720}},
            f"added_tokens.json gives the token '{END}' the id 720, but tokenizer.json has no "
            "tokens for the ids 706 and on",
        ),
    ],
)  # fmt: skip
def test_files_that_contradict_each_other_are_refused_by_name(
    folder: Path, files: dict[str, object], says: str
) -> None:
    for name, value in files.items():
        write(folder, name, value)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_folder(folder)
    assert says in str(caught.value) and str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder must be"),
        ("tokenizer_config.json", {"added_tokens_decoder": None}, "added_tokens_decoder must be"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": token("y")}}, "'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"lstrip": True}}}, "lstrip"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 30: token("y")}}, "entries like"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: token("y")}}, "like"),
        ("added_tokens.json", {"<a>": "first"}, "'<a>' must have an id, got 'first'"),
        ("added_tokens.json", {"<a>": -1}, "must have an id, got -1"),
        ("added_tokens.json", {"<a>": True}, "must have an id, got True"),
        ("added_tokens.json", ["<a>"], "must hold a JSON object, not list"),
        ("special_tokens_map.json", "x", "must hold a JSON object, not str"),
        ("config.json", [], "must hold a JSON object, not list"),
    ],
)
def test_what_is_no_list_of_tokens_is_refused(
    folder: Path, name: str, value: object, says: str
) -> None:
    write(folder, name, value)
    with pytest.raises(CheckpointError, match=rf"{name}: ") as caught:
        Tokenizer.from_folder(folder)
    assert says in str(caught.value) and len(str(caught.value)) < 400


def test_a_named_token_without_an_id_needs_an_embedding(folder: Path) -> None:
    """As in transformers it takes the next id, but never one beyond the model's vocabulary."""
    write(folder, "tokenizer_config.json", {"pad_token": "<pad>"})
    for vocab_size, token_id in [(None, None), (706, None), (707, 706), (1024, 706)]:
        write(folder, "config.json", {"vocab_size": vocab_size})
        assert Tokenizer.from_folder(folder).token_to_id("<pad>") == token_id
    assert oracle(folder).token_to_id("<pad>") == 706


def test_a_named_token_takes_no_id_that_is_taken(tmp_path: Path) -> None:
    """A vocabulary with a gap: the library counts its tokens, and gives the count as an id."""
    tokenizers.Tokenizer(models.BPE({"a": 0, "b": 2}, [])).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"pad_token": "<pad>"})
    write(tmp_path, "config.json", {"vocab_size": 64})
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.token_to_id("<pad>") is None and tokenizer.id_to_token(2) == "b"


def test_a_special_token_stays_one(folder: Path) -> None:
    """As in the library: a flag in the config does not make control tokens visible."""
    listed = {"4": token("<|im_end|>", special=False)}
    write(folder, "tokenizer_config.json", {"added_tokens_decoder": listed})
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.decode([4], skip_special_tokens=True) == ""
    assert oracle(folder).decode([4], skip_special_tokens=True) == ""


def test_added_tokens_of_tokenizer_json_that_get_other_ids_are_refused(tmp_path: Path) -> None:
    """The library gives such a token the next free id and says nothing."""
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.add_special_tokens(["<end>"])
    value = json.loads(backend.to_str())
    assert value["added_tokens"][0]["id"] == 2
    value["added_tokens"][0]["id"] = 7
    write(tmp_path, "tokenizer.json", value)
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json: the added token '<end>' has the id 7"
    ):
        Tokenizer.from_folder(tmp_path)


def test_an_eos_without_an_id_and_ids_beyond_the_model_are_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, "tokenizer_config.json", {"eos_token": END})
    write(folder, "config.json", {"vocab_size": 706})
    assert Tokenizer.from_folder(folder).eos_token_id is None
    assert "eos_token '<|end_of_turn|>' has no id in any file" in caplog.text
    caplog.clear()
    write(folder, "config.json", {"text_config": {"vocab_size": 707}})  # of a model for images
    assert Tokenizer.from_folder(folder).eos_token_id == 706
    write(folder, "config.json", {"vocab_size": 707})
    assert Tokenizer.from_folder(folder).eos_token_id == 706
    assert not caplog.records
    write(folder, "added_tokens.json", {END: 706, "<pad>": 707, "<cls>": 708})
    assert Tokenizer.from_folder(folder).token_to_id("<pad>") == 707
    (record,) = caplog.records
    assert "the id of <pad>, 707, is beyond the vocab_size of config.json, 707, and 1 more" in (
        record.getMessage()
    )


def test_ids_of_a_vocabulary_beyond_the_model_are_told(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(folder, "config.json", {"vocab_size": 600})
    Tokenizer.from_folder(folder)
    (record,) = caplog.records
    assert ", 600, is beyond the vocab_size of config.json, 600, and" in record.getMessage()


def test_an_id_around_every_text_that_the_model_lacks_is_refused(folder: Path) -> None:
    backend = samples.byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<q> $A", special_tokens=[("<q>", 9999)]
    )
    backend.save(str(folder / "tokenizer.json"))
    Tokenizer.from_folder(folder)  # without config.json nobody knows
    write(folder, "config.json", {"vocab_size": 706})
    with pytest.raises(CheckpointError, match=r"puts the id 9999 .* config.json, 706"):
        Tokenizer.from_folder(folder)
