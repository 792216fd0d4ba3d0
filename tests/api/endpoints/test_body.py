"""Bodies: every way to be wrong is a 400 that says where; fields without effect are named."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from pyserve.api.endpoints import body as body_module
from pyserve.api.endpoints.body import IGNORED_HEADER, Wire, ignored_header
from pyserve.api.wire import lenient
from pyserve.api.wire.lenient import MAX_NAMES
from pyserve.api.wire.protocol import MAX_MESSAGES, ChatRequest, CompletionRequest
from pyserve.errors import InvalidRequestError, NotBuiltError, RequestError
from pyserve.features import fields_of

CHAT = Wire(ChatRequest)
COMPLETION = Wire(CompletionRequest)
MESSAGES = [{"role": "user", "content": "hi"}]
PREFIX = b'{"messages": [{"role": "user", "content": "hi"}], '


def chat(**fields: Any) -> tuple[ChatRequest, list[str]]:
    return CHAT.decode(json.dumps({"messages": MESSAGES, **fields}).encode())


BAD: list[tuple[str, bytes, str | None, str]] = [
    ("empty", b"", None, "not valid JSON"),
    ("cut off", b'{"messages": ', None, "not valid JSON"),
    ("trailing", b'{"messages": []} x', None, "not valid JSON"),
    ("not an object", b"[1]", None, "the body: expected object, got array"),
    ("missing field", b"{}", "messages", "messages is missing"),
    ("missing inner field", b'{"messages": [{"content": "x"}]}', "messages[0].role", "missing"),
    ("wrong type", PREFIX + b'"top_k": "x"}', "top_k", "expected int | null, got str"),
    ("fraction", PREFIX + b'"n": 2.5}', "n", "must be a whole number, got 2.5"),
    ("bool for int", PREFIX + b'"n": true}', "n", "expected int | null, got bool"),
    ("int for bool", PREFIX + b'"stream": 1}', "stream", "expected bool | null, got int"),
    ("inner type", PREFIX + b'"stop": ["a", 3]}', "stop[1]", "expected str, got int"),
    ("bias", PREFIX + b'"logit_bias": {"5": "x"}}', "logit_bias[...]", "expected float, got str"),
    ("NaN", PREFIX + b'"temperature": NaN}', None, "not valid JSON"),
    ("Infinity", PREFIX + b'"temperature": -Infinity}', None, "not valid JSON"),
    ("1e999", PREFIX + b'"temperature": 1e999}', "temperature", "out of range"),
    ("endless int", PREFIX + b'"seed": ' + b"9" * 10_000 + b"}", "seed", "out of range"),
    ("huge int as float", PREFIX + b'"top_p": ' + b"9" * 400 + b"}", "top_p", "out of range"),
    ("arrays", b"[" * 10_000 + b"]" * 10_000, None, "the body"),
    ("deep unknown", PREFIX + b'"x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", None, "too deeply"),
    ("deep object", PREFIX + b'"metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, None, "deep"),
    ("bad utf-8", PREFIX + b'"stop": "\xff"}', None, "not valid UTF-8"),
    ("bad utf-8 in an unknown field", PREFIX + b'"x": "\xc3\x28"}', None, "not valid UTF-8"),
    ("utf-16", '{"messages": []}'.encode("utf-16"), None, "not valid UTF-8"),
    ("lone surrogate", PREFIX + b'"stop": "\\ud800"}', None, "not valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "words"), [c[1:] for c in BAD], ids=[c[0] for c in BAD])
def test_bad_bodies(body: bytes, param: str | None, words: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        CHAT.decode(body)
    assert words in caught.value.message
    assert caught.value.param == param
    assert not re.search(r"msgspec|Struct|object at|\$", caught.value.message)


def test_duplicate_keys_and_nulls_are_fine() -> None:
    body, ignored = CHAT.decode(PREFIX + b'"n": 1, "n": 2, "user": null, "foo": null}')
    assert body.n == 2 and ignored == []
    nulls = dict.fromkeys(ChatRequest.__struct_fields__)
    assert chat(**{**nulls, "messages": MESSAGES}) == chat()


def test_a_byte_order_mark_is_skipped() -> None:
    """Windows writes one: PowerShell's Out-File, Notepad. One at the start, no other."""
    data = json.dumps({"messages": MESSAGES, "n": 2.0}).encode("utf-8-sig")
    assert CHAT.decode(data)[0].n == 2
    for broken in (data[:3] + data, data[3:] + data[:3], data[:3], data[:2]):
        with pytest.raises(InvalidRequestError):
            CHAT.decode(broken)


def test_what_nobody_looks_at_is_not_kept_of_a_large_body() -> None:
    """It would be in memory for as long as the answer takes, up to 32 MB a request."""
    many = ["x" * 1000] * 100
    body, ignored = chat(user="u" * 100_000, metadata={"x": many})
    assert (body.user, body.metadata) == (None, None)
    assert sorted(ignored) == ["metadata", "user"]
    with pytest.raises(NotBuiltError):
        chat(logits_processors=many)
    text, ignored = COMPLETION.decode(json.dumps({"prompt": "hi", "user": "u" * 100_000}).encode())
    assert (text.prompt, text.user, ignored) == ("hi", None, ["user"])


SAMPLES: dict[str, Any] = {
    "logits_processors": ["a"], "kv_transfer_params": {"a": 1}, "vllm_xargs": {"a": 1},
    "repetition_detection": {"min_count": 2},
}  # fmt: skip


# What makes them ask for something.
BESIDE: dict[str, dict[str, Any]] = {}


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_what_is_not_built_is_refused_by_name(name: str) -> None:
    with pytest.raises(NotBuiltError, match=f"{name} is not built yet") as caught:
        chat(**{name: SAMPLES[name], **BESIDE.get(name, {})})
    assert caught.value.param == name
    for value in fields_of(ChatRequest)[name].neutral:
        assert chat(**{name: value})[1] == []


def test_every_chat_field_that_is_not_built_is_tried() -> None:
    rows = fields_of(ChatRequest)
    assert {name for name, row in rows.items() if not row.is_ignored} == SAMPLES.keys()


@pytest.mark.parametrize(("name", "value"), [("suffix", "x"), ("prompt_embeds", "AAAA")])
def test_fields_of_completions(name: str, value: object) -> None:
    with pytest.raises(NotBuiltError, match=name):
        COMPLETION.decode(json.dumps({"prompt": "x", name: value}).encode())


ASKS_FOR_NOTHING: list[tuple[dict[str, Any], list[str]]] = [
    ({"response_format": {"type": "text", "json_schema": None}}, []),
    ({"response_format": {"type": "text", "json_schema": {"name": "x", "lax": 1}}},
     ["response_format.json_schema.lax"]),
    ({"guided_decoding_backend": "xgrammar", "guided_regex": "a"}, ["guided_decoding_backend"]),
    ({"mm_processor_kwargs": {"a": 1}, "media_io_kwargs": {}}, ["mm_processor_kwargs"]),
    ({"safety_identifier": "u", "prompt_cache_key": "k", "verbosity": "low",
      "modalities": ["text"], "prediction": None, "store": True, "metadata": {"a": "b"}},
     ["safety_identifier", "prompt_cache_key", "verbosity", "modalities", "store", "metadata"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "named"), ASKS_FOR_NOTHING)
def test_what_asks_for_nothing_is_accepted_and_named(
    fields: dict[str, Any], named: list[str]
) -> None:
    for order in (fields, dict(reversed(fields.items()))):
        assert sorted(chat(**order)[1]) == sorted(named)


@pytest.mark.parametrize(
    ("fields", "refused", "instead"),
    [
        ({"logits_processors": ["x"]}, "logits_processors", "leave it out"),
    ],
)
def test_what_asks_for_something_is_refused(
    fields: dict[str, Any], refused: str, instead: str
) -> None:
    with pytest.raises(NotBuiltError, match=instead) as caught:
        chat(**fields)
    assert caught.value.param == refused


def test_fields_without_effect_are_named() -> None:
    _, ignored = chat(
        user="u", metadata={"a": "b"}, store=True, service_tier="flex", foo=1,
        spaces_between_special_tokens=False, stream=True, stream_options={"include_x": True},
    )  # fmt: skip
    assert sorted(ignored) == [
        "foo", "metadata", "service_tier", "spaces_between_special_tokens", "store",
        "stream_options.include_x", "user",
    ]  # fmt: skip
    assert chat(metadata={}, store=False, service_tier="auto")[1] == []


def test_unknown_fields_within_messages_are_named() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {}}]},
        {"role": "assistant", "content": "y", "refusal": None, "annotations": [1]},
    ]
    _, ignored = CHAT.decode(json.dumps({"messages": messages}).encode())
    assert ignored == ["messages.content.cache_control", "messages.annotations"]


def test_the_header_is_short_and_clean() -> None:
    assert ignored_header([]) == {}
    header = ignored_header(["b\r\nSet-Cookie: x", "é", "a"])[IGNORED_HEADER]
    assert header == "a, b??Set-Cookie??x, ?"
    header = ignored_header([f"{i:03}" + "x" * 1000 for i in range(500)])[IGNORED_HEADER]
    assert len(header) < 2500 and header.endswith(", ...")


def test_an_ordinary_body_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*values: object) -> None:
        raise AssertionError("decoded once more")

    monkeypatch.setattr(lenient.Lenient, "decode", fail)
    monkeypatch.setattr(body_module, "_check_utf8", fail)
    parts = [{"role": "user", "content": [{"type": "text", "text": "é"}], "name": None}]
    body, ignored = chat(
        messages=parts, model="m", stream=True, stream_options={"include_usage": True}, user="u"
    )
    assert body.stream and ignored == ["user"]
    assert COMPLETION.decode(b'{"prompt": [[1, 2], [3]], "logit_bias": {"5": 1}}')[1] == []


def test_a_number_out_of_range_is_named_beside_an_unknown_field() -> None:
    with pytest.raises(InvalidRequestError, match="seed: number out of range") as caught:
        CHAT.decode(PREFIX + b'"x": 1, "seed": ' + b"9" * 10_000 + b"}")
    assert caught.value.param == "seed"


def test_unknown_fields_leave_the_rest_as_it_is() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "a", "x": [1.5]}, "b"]}]
    fields = {
        "logit_bias": {"5": 1}, "chat_template_kwargs": {"a": [1, 2.5, {"b": None}]}, "seed": 3,
        "stop_token_ids": [1, 2], "temperature": 1, "messages": messages,
    }  # fmt: skip
    plain, _ = chat(**json.loads(json.dumps(fields).replace(', "x": [1.5]', "")))
    beside, ignored = chat(**fields, foo={"bar": 1})
    assert repr(beside) == repr(plain) and sorted(ignored) == ["foo", "messages.content.x"]


def test_no_more_names_are_kept_than_are_shown() -> None:
    messages = [{"role": "user", "content": "x", f"m{i}": 1} for i in range(1000)]
    fields = {f"k{i}": 1 for i in range(1000)}
    for data in ({"messages": messages}, {"messages": MESSAGES, **fields}):
        _, ignored = CHAT.decode(json.dumps(data).encode())
        assert len(ignored) == MAX_NAMES + 1
        assert ignored_header(ignored)[IGNORED_HEADER].endswith(", ...")
    with pytest.raises(NotBuiltError, match="logits_processors"):  # is looked for behind them
        chat(**fields, logits_processors=["x"])


def test_messages_are_counted_before_they_are_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*values: object) -> None:
        raise AssertionError("looked into")

    monkeypatch.setattr(lenient, "_settle", fail)
    with pytest.raises(InvalidRequestError, match=f"1 to {MAX_MESSAGES} messages, got 4097"):
        chat(messages=MESSAGES * 4097)
    with pytest.raises(InvalidRequestError, match="16385 content parts"):
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": ""}] * 16385}])


def test_utf8_is_checked_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_module, "UTF8_PIECE_BYTES", 3)
    body, _ = chat(messages=[{"role": "user", "content": "漢字😀é"}])
    assert body.messages[0].content == "漢字😀é"
    text = json.dumps({"x": "😀" * 9}, ensure_ascii=False).encode()
    for cut in (text[:-3], text.replace(b"\x80", b"a", 1)):
        with pytest.raises(InvalidRequestError, match="UTF-8"):
            CHAT.decode(cut)


def test_messages_never_show_a_class() -> None:
    for body in (b'{"messages": 5}', b'{"messages": [5]}', b'{"messages": [{"role": {}}]}'):
        with pytest.raises(RequestError) as caught:
            CHAT.decode(body)
        assert "Message" not in caught.value.message
