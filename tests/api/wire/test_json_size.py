"""Values are counted exactly, wherever the pieces are cut, and too many are refused undecoded."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from pyserve.api.wire import json_size
from pyserve.api.wire.json_size import (
    MAX_BODY_IDS,
    MAX_DIGITS,
    MAX_JSON_CONTAINERS,
    MAX_JSON_VALUES,
    Structure,
    check_structure,
    measure,
)
from pyserve.api.wire.protocol import MAX_REQUEST_TOKENS
from pyserve.errors import InvalidRequestError

STRINGS = ["", "a", '"', "\\", '\\"', '{"a": [1, 2]}', "\\\\", "é,[{", "\\" * 7 + '"']


def random_value(rng: random.Random, found: Structure, depth: int) -> Any:
    kind = rng.randrange(4 if depth else 2)
    if kind == 0:
        return rng.choice([1, -2.5, True, None])
    if kind == 1:
        found.num_strings += 1
        return rng.choice(STRINGS)
    size = rng.randrange(5)
    found.num_brackets += 1
    found.num_commas += max(size - 1, 0)
    values = [random_value(rng, found, depth - 1) for _ in range(size)]
    if kind == 2:
        return values
    found.num_strings += size
    return {f"{i}{rng.choice(STRINGS)}": value for i, value in enumerate(values)}


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 64, 2**18])
def test_counts_are_exact(monkeypatch: pytest.MonkeyPatch, piece_bytes: int) -> None:
    monkeypatch.setattr(json_size, "PIECE_BYTES", piece_bytes)
    rng = random.Random(piece_bytes)
    for _ in range(300):
        found = Structure()
        value = random_value(rng, found, 4)
        for ensure_ascii in (False, True):
            assert measure(json.dumps(value, ensure_ascii=ensure_ascii).encode()) == found


def test_text_is_no_structure() -> None:
    text = json.dumps({"prompt": '[{"a": 1},' * 200_000}).encode()
    assert measure(text) == Structure(0, 1, 2)
    check_structure(text, 0)


@pytest.mark.parametrize(
    "unit", [b"1", b'""', b"{}", b"[]", b'{"a":1}', b'{"role":"user","content":""}']
)
def test_too_many_values(unit: bytes) -> None:
    body = b"[" + b",".join([unit] * (MAX_JSON_VALUES + 2)) + b"]"
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_JSON_VALUES} values"):
        check_structure(body, 0)


@pytest.mark.parametrize("unit", [b"{}", b"[]", b'{"a":1}'])
def test_too_many_containers(unit: bytes) -> None:
    inner = b",".join([unit] * (MAX_JSON_CONTAINERS - 1))
    check_structure(b"[" + inner + b"]" + b" " * MAX_JSON_VALUES, 0)
    with pytest.raises(InvalidRequestError, match=f"more than {MAX_JSON_CONTAINERS} values"):
        check_structure(b"[" + inner + b"," + unit + b"]", 0)


def test_lists_of_ids_may_hold_what_the_context_does() -> None:
    ids = b",".join([b"17"] * 300_000)
    check_structure(b'{"prompt":[' + ids + b"]}", 100_000)
    check_structure(b'{"prompt":[[' + ids + b"],[" + ids + b"]]}", 200_000)
    with pytest.raises(InvalidRequestError, match="more than 151072 values"):
        check_structure(b'{"prompt":[' + ids + b"]}", 10_000)
    many = b'{"prompt":[' + b",".join([b"[" + ids + b"]"] * 4) + b"]}"
    with pytest.raises(InvalidRequestError, match=f"{MAX_BODY_IDS + MAX_JSON_VALUES} values"):
        check_structure(many, 300_000)
    check_structure(many, 2**21)  # where one prompt may have as many
    endless = b'{"prompt":[' + b",".join([b"7"] * (MAX_REQUEST_TOKENS + MAX_JSON_VALUES + 2))
    with pytest.raises(InvalidRequestError, match=f"{MAX_REQUEST_TOKENS + MAX_JSON_VALUES} values"):
        check_structure(endless, 2**24)


@pytest.mark.parametrize("digit", ["1", "9", "0.1"])
def test_a_number_of_too_many_digits(digit: str) -> None:
    padding = " " * MAX_JSON_CONTAINERS
    digits = digit + digit[-1] * (MAX_DIGITS - 1)
    check_structure(f'{{"a":{digits},"b":"{digits * 9}"}}{padding}'.encode(), 0)
    with pytest.raises(InvalidRequestError, match="a number of more than 309 digits"):
        check_structure(f'{{"a":{digits}{digits[-1]}}}{padding}'.encode(), 0)
