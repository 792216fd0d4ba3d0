from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pyserve.errors import CheckpointError
from pyserve.text.convert import convert_tokenizer
from pyserve.text.tokenizer import Tokenizer
from tests.text import samples

CONFIG = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>",
          "unk_token": "<unk>"}  # fmt: skip


def test_vocabulary_and_merges_become_the_same_tokenizer(tmp_path: Path) -> None:
    backend = samples.byte_level()
    backend.model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer.from_folder(tmp_path, converted=convert_tokenizer(tmp_path))
    for text in samples.TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.eos_token_id == 2


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_eos_token": True}])
def test_flags_count_where_there_is_no_tokenizer_json(
    tmp_path: Path, flags: dict[str, bool]
) -> None:
    samples.byte_level().model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG | flags))
    tokenizer = Tokenizer.from_folder(tmp_path, converted=convert_tokenizer(tmp_path))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    for text in ("", "the fox", "</s>x"):
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids == theirs.encode(text)
        assert ids[:1] == [1] or "add_bos_token" not in flags
        assert ids[-1:] == [2] or "add_eos_token" not in flags


def test_what_cannot_be_converted_names_folder_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer.json nor tokenizer.model nor "):
        convert_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("junk")
    with pytest.raises(CheckpointError, match=r"cannot convert .*--tokenizer names") as caught:
        convert_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_panic_of_the_library_is_refused_too(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("a b\n")  # makes a token that is not in the vocabulary
    with pytest.raises(CheckpointError, match=r"cannot convert .*--tokenizer names") as caught:
        convert_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "module", ["None", "types.SimpleNamespace(AutoTokenizer=None, __version__='5.2.1')"]
)
def test_without_transformers_it_says_what_to_install(tmp_path: Path, module: str) -> None:
    """An older one would run code that a config names; the rest of pyserve needs none at all."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_text("")
    code = (
        f"import sys, types, pathlib\nsys.modules['transformers'] = {module}\n"
        f"from pyserve import cli, errors\n"
        f"try:\n    cli._tokenizer(pathlib.Path({str(tmp_path)!r}))\n"
        "except errors.CheckpointError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == (
        f"{tmp_path}: no tokenizer.json; to convert vocab.json + merges.txt, pip install "
        "'transformers>=5.3', or --tokenizer names another folder that has tokenizer.json\n"
    ), done.stderr
