"""tokenizer.json, read by the `tokenizers` library. Files on which that panics are refused.

A panic prints two lines of its own to stderr, which nothing in Python can keep it from.
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
MAX_GROWTH = 16  # of a text, by a normalizer or decoder: more would fill memory

_PARTS = ("normalizers", "processors", "decoders")  # of a Sequence
_TRIAL = "Hello, w\u00f6rld!\n 1"


class _TokenInFile(msgspec.Struct):
    id: int
    content: str


class _TokenizerJson(msgspec.Struct):
    """What is asked of the file beside the library; all else in it is passed over."""

    added_tokens: list[_TokenInFile] = []
    normalizer: Any = None
    decoder: Any = None
    post_processor: Any = None


def read_backend(path: Path) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer in the file, and whether the file speaks of the byte-level alphabet.

    Raises CheckpointError naming the file, and the section where that is known.
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
    for token in stated.added_tokens:  # the library gives the next free id, whatever the file says
        given = backend.token_to_id(token.content)
        if token.content and given != token.id:
            raise CheckpointError(
                f"{path}: the added token {token.content!r:.100} has the id {token.id}, but its "
                f"place in the vocabulary is {given}; the ids before it have no tokens"
            )
    return backend, '"ByteLevel"' in text


def try_out(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Use the tokenizer once: one that panics at any text must do so now, not at each request.

    path  of the file that the tokenizer comes from, for the error: a CheckpointError.
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
    """Where `inner` begins in `outer`; None where it is not in it."""
    starts = range(len(outer) - len(inner) + 1)
    return next((at for at in starts if outer[at : at + len(inner)] == inner), None)


def _encode(backend: tokenizers.Tokenizer) -> None:
    with suppress(Exception):  # a small vocabulary has no tokens for it
        backend.encode(_TRIAL, add_special_tokens=True)


def _growth(step: Any) -> int:
    """Roughly how many characters a section may make of one; of a post-processor: tokens."""
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Sequence":
        return prod(_growth(part) for name in _PARTS for part in step.get(name) or [])
    if kind == "TemplateProcessing":
        return sum("Sequence" in piece for piece in step.get("single") or [])
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend")))
    return max(1, len(str(step.get("content")))) if kind == "Replace" else 1


def _section_at_fault(text: str) -> str:
    """ ": its normalizer", where the file would do without that section; else nothing."""
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
