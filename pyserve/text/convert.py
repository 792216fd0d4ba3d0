"""A folder with only vocab.json and merges.txt -> the tokenizer that transformers makes of them.

This is the only module that imports transformers, which imports torch and takes seconds. The extra
`convert` installs it. So only cli.py imports this module, and only if a folder needs it. Code in
the folder is never run.
"""

from __future__ import annotations

from pathlib import Path

import tokenizers

from pyserve.errors import CheckpointError
from pyserve.model_files import guarded, reason_of
from pyserve.text.sentencepiece_model import MODEL_FILE
from pyserve.text.tokenizer import Converted
from pyserve.text.tokenizer_json import TOKENIZER_FILE

try:
    from transformers import AutoTokenizer, __version__
except ImportError:
    __version__ = "0"

MIN_TRANSFORMERS = (5, 3)  # older versions run code that a model's config names

_SOURCES = ("vocab.json", "merges.txt")
_REMEDY = f"--tokenizer names another folder that has {TOKENIZER_FILE}"


def convert_tokenizer(folder: Path) -> Converted:
    """The tokenizer for the folder. Raises CheckpointError naming a remedy."""
    if not all((folder / name).is_file() for name in _SOURCES):
        raise CheckpointError(
            f"{folder}: neither {TOKENIZER_FILE} nor {MODEL_FILE} nor {' + '.join(_SOURCES)}; "
            f"{_REMEDY}"
        )
    if tuple(map(int, __version__.split(".")[:2])) < MIN_TRANSFORMERS:
        needed = ".".join(map(str, MIN_TRANSFORMERS))
        raise CheckpointError(
            f"{folder}: no {TOKENIZER_FILE}; to convert {' + '.join(_SOURCES)}, "
            f"pip install 'transformers>={needed}', or {_REMEDY}"
        )
    try:
        with guarded(str(folder)):
            converted = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
            backend = converted.backend_tokenizer
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: no {TOKENIZER_FILE}, and transformers cannot convert what is there "
            f"({reason_of(error.__cause__ or error)}); {_REMEDY}"
        ) from error
    assert isinstance(backend, tokenizers.Tokenizer)
    return Converted(backend, _SOURCES[0])
