"""JSON of any shape: exact, and no number takes far longer than another."""

from __future__ import annotations

import time

import msgspec
import pytest

from pyserve import any_json
from pyserve.api.endpoints.body import Wire
from pyserve.api.wire.protocol import ChatRequest
from pyserve.errors import InvalidRequestError

COSTLY = ("1e308", "-1.7976931348623157e308", "5e-324", "9007199254740993.0")
NUM_NUMBERS = 20_000
MAX_RATIO = 60.0  # it was 300 to 500, and is 2 to 10


def chat(field: bytes) -> bytes:
    return b'{"messages": [{"role": "user", "content": "x"}], %b}' % field


def seconds(text: bytes) -> float:
    """Of processor time, the least of three."""
    wire, times = Wire(ChatRequest), []
    for _ in range(3):
        began_s = time.thread_time()
        wire.decode(text)
        times.append(time.thread_time() - began_s)
    return min(times)


@pytest.mark.parametrize("text", [*COSTLY, "0.1", "1e23", "-0.0", "1e-400", "2.5E+3", "7"])
def test_a_number_is_what_python_reads(text: str) -> None:
    found = any_json.decode(f'{{"a": [{text}]}}')["a"][0]
    assert repr(found) == repr(int(text) if text == "7" else float(text))


def test_a_number_out_of_range_is_refused_with_its_place() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"out of range - at `\$\[\.\.\.\]\[1\]`"):
        any_json.decode(b'{"a": [1, 1e309]}')
    with pytest.raises(InvalidRequestError, match="out of range") as caught:
        Wire(ChatRequest).decode(chat(b'"chat_template_kwargs": {"a": [1, 1e309]}'))
    assert caught.value.param == "chat_template_kwargs[...][1]"


@pytest.mark.parametrize("number", COSTLY)
@pytest.mark.parametrize("field", ["chat_template_kwargs", "logit_bias"])
def test_no_number_of_a_body_takes_long_to_read(field: str, number: str) -> None:
    def body(one: str) -> bytes:
        values = ",".join(f'"{i}":{one}' for i in range(NUM_NUMBERS))
        return chat(f'"{field}": {{{values}}}'.encode())

    assert seconds(body(number)) < MAX_RATIO * seconds(body("0.5")) + 0.001


def test_a_bias_that_is_no_number_is_refused_by_its_place() -> None:
    with pytest.raises(InvalidRequestError, match="expected float, got str") as caught:
        Wire(ChatRequest).decode(chat(b'"logit_bias": {"5": "x"}'))
    assert caught.value.param == "logit_bias[...]"
