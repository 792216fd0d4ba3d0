from __future__ import annotations

from pathlib import Path

import pytest

from pyserve.text.tokenizer import Tokenizer
from tests.text import samples


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of tokenizer files for each kind; trained once."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: samples.save(make(), root / kind) for kind, make in samples.KINDS.items()}


@pytest.fixture(scope="session", params=list(samples.KINDS))
def tokenizer(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Tokenizer:
    return Tokenizer.from_folder(folders[request.param])


@pytest.fixture(scope="session")
def byte_level(folders: dict[str, Path]) -> Tokenizer:
    return Tokenizer.from_folder(folders["byte_level"])


@pytest.fixture(scope="session")
def sentencepiece(folders: dict[str, Path]) -> Tokenizer:
    return Tokenizer.from_folder(folders["sentencepiece"])
