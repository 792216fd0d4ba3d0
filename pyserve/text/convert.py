"""A folder without tokenizer.json -> the tokenizer that transformers converts it to.

The only place in `text` that imports transformers (and torch with it: seconds), so only cli.py
imports this module, where a folder needs it. Code in the folder is never run.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
from transformers import AutoTokenizer

from pyserve.errors import CheckpointError
from pyserve.text.tokenizer import TOKENIZER_FILE

# Sets of files that transformers converts without code of the folder's own.
_SOURCES = (("tokenizer.model",), ("vocab.json", "merges.txt"))


def needs_conversion(folder: Path) -> bool:
    """Whether the folder has tokenizer files, but not tokenizer.json."""
    return not (folder / TOKENIZER_FILE).is_file() and _has_source(folder)


def convert_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The `backend` of Tokenizer.from_folder. Raises CheckpointError with the remedy."""
    if not _has_source(folder):
        expected = " nor ".join(" + ".join(names) for names in _SOURCES)
        raise CheckpointError(
            f"{folder}: neither {TOKENIZER_FILE} nor {expected}; "
            "--tokenizer names another folder that has one"
        )
    try:
        converted = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        backend = converted.backend_tokenizer
    except ImportError as error:  # SentencePiece files need two packages to be read
        raise CheckpointError(
            f"{folder}: no {TOKENIZER_FILE}, and converting tokenizer.model needs two packages: "
            "pip install sentencepiece protobuf"
        ) from error
    except Exception as error:  # whatever a damaged file makes the converters raise
        raise CheckpointError(
            f"{folder}: no {TOKENIZER_FILE}, and transformers cannot convert what is there: {error}"
        ) from error
    assert isinstance(backend, tokenizers.Tokenizer)
    return backend


def _has_source(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in _SOURCES)
