"""A folder without tokenizer.json -> the tokenizer that transformers converts it to.

The only place in `text` that imports transformers (and torch with it: seconds), so only cli.py
imports this module, where a folder needs it. Code in the folder is never run.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import tokenizers
from transformers import AutoTokenizer

from pyserve.errors import CheckpointError
from pyserve.text.tokenizer import TOKENIZER_FILE

# Sets of files that transformers converts without code of the folder's own.
_SOURCES = (("tokenizer.model",), ("vocab.json", "merges.txt"))
# What transformers reads tokenizer.model with: package -> module. Nothing else here needs them.
_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
_REMEDY = f"--tokenizer names another folder that has {TOKENIZER_FILE}"


def convert_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The `backend` of Tokenizer.from_folder. Raises CheckpointError with the remedy."""
    if not _has_source(folder):
        expected = " nor ".join(" + ".join(names) for names in _SOURCES)
        raise CheckpointError(f"{folder}: neither {TOKENIZER_FILE} nor {expected}; {_REMEDY}")
    missing = [name for name, module in _SENTENCEPIECE.items() if not _is_installed(module)]
    if missing and (folder / "tokenizer.model").is_file():
        raise CheckpointError(
            f"{folder}: no {TOKENIZER_FILE}; to convert tokenizer.model, "
            f"pip install {' '.join(missing)}, or {_REMEDY}"
        )
    try:
        converted = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        backend = converted.backend_tokenizer
    except Exception as error:  # whatever a damaged file makes the converters raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{folder}: no {TOKENIZER_FILE}, and transformers cannot convert what is there "
            f"({reason}); {_REMEDY}"
        ) from error
    assert isinstance(backend, tokenizers.Tokenizer)
    return backend


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is not there
        return False


def _has_source(folder: Path) -> bool:
    return any(all((folder / name).is_file() for name in names) for names in _SOURCES)
