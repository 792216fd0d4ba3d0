"""Reads tokenizer.json with the `tokenizers` library. Files on which the library panics are
refused.

A panic prints two lines to stderr, which Python code cannot prevent.
"""

from __future__ import annotations

import json
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import tokenizers

from pyserve.errors import CheckpointError
from pyserve.model_files import guarded, read_text, reason_of

TOKENIZER_FILE = "tokenizer.json"
MAX_GROWTH = 16  # how many times as long a normalizer or decoder may make a text

_PARTS = ("normalizers", "processors", "decoders")  # keys under which a Sequence lists its parts
_TRIAL = "Hello, w\u00f6rld!\n 1"


class _TokenInFile(msgspec.Struct):
    id: int
    content: str


class _TokenizerJson(msgspec.Struct):
    """The fields of the file that are checked here; all others are ignored."""

    added_tokens: list[_TokenInFile] = []
    normalizer: Any = None
    decoder: Any = None
    post_processor: Any = None


def read_backend(path: Path) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer in the file, and whether the file mentions the byte-level alphabet.

    Raises CheckpointError naming the file, and the section at fault if that is known.
    """
    text = read_text(path)
    if text is None:
        raise CheckpointError(
            f"{path.parent}: no {TOKENIZER_FILE}; --tokenizer names another folder that has one"
        )
    try:
        with guarded(str(path)):
            backend = tokenizers.Tokenizer.from_str(text)
            stated = msgspec.json.decode(text, type=_TokenizerJson)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: tokenizers {tokenizers.__version__} cannot read it{_section_at_fault(text)} "
            f"({reason_of(error.__cause__ or error)}); the file is damaged or needs a newer "
            "version of tokenizers"
        ) from error
    for section in ("normalizer", "decoder"):
        if _growth(getattr(stated, section)) > MAX_GROWTH:
            raise CheckpointError(
                f"{path}: {section} can make a text more than {MAX_GROWTH} times as long"
            )
    if _growth(stated.post_processor) != 1:
        raise CheckpointError(f"{path}: post_processor must hold a text once, not never or twice")
    for token in stated.added_tokens:  # the library ignores these ids and gives the next free one
        given = backend.token_to_id(token.content)
        if token.content and given != token.id:
            raise CheckpointError(
                f"{path}: the added token {token.content!r:.100} has the id {token.id}, but its "
                f"place in the vocabulary is {given}; the ids before it have no tokens"
            )
    return backend, '"ByteLevel"' in text


def try_out(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Encode a text once, so that a tokenizer which panics on any text does so now, not in each
    request.

    path  the file that the tokenizer comes from.

    Raises CheckpointError naming that file.
    """
    try:
        with guarded(str(path)):
            _encode(backend)
    except CheckpointError as error:
        text = read_text(path) if path.name == TOKENIZER_FILE else None
        raise CheckpointError(
            f"{path}: tokenizers {tokenizers.__version__} cannot encode with it"
            f"{_section_at_fault(text or '')} ({reason_of(error.__cause__ or error)})"
        ) from error


def place_of(inner: list[int], outer: list[int]) -> int | None:
    """The index at which `inner` begins in `outer`; None if it is not a part of it."""
    starts = range(len(outer) - len(inner) + 1)
    return next((at for at in starts if outer[at : at + len(inner)] == inner), None)


def _encode(backend: tokenizers.Tokenizer) -> None:
    with suppress(Exception):  # a small vocabulary may lack tokens for this text
        backend.encode(_TRIAL, add_special_tokens=True)


def _growth(step: Any) -> int:
    """Roughly how many characters a section may make of one; for a post-processor, how many times
    it holds the text.
    """
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Sequence":
        return prod(_growth(part) for name in _PARTS for part in step.get(name) or [])
    if kind == "TemplateProcessing":
        return sum("Sequence" in piece for piece in step.get("single") or [])
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend")))
    return max(1, len(str(step.get("content")))) if kind == "Replace" else 1


def _section_at_fault(text: str) -> str:
    """ ": its normalizer" or another section, if the file is usable without that
    section; else "".
    """
    try:
        stated = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return ""
    if not isinstance(stated, dict):
        return ""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if stated.get(name) is not None and _is_usable(stated | {name: None}):
            return f": its {name}"
    return "" if _is_usable({"model": stated.get("model"), "added_tokens": []}) else ": its model"


def _is_usable(stated: dict[str, Any]) -> bool:
    try:
        with guarded(TOKENIZER_FILE):
            _encode(tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", **stated})))
    except CheckpointError:
        return False
    return True
