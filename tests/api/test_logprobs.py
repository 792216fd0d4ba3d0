"""What answers tell of their tokens, field by field, streamed and whole, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from tests.api.fakes import TEMPLATE, Server, logprobs_of, make_tokenizer_folder, run_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASK = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = make_tokenizer_folder(tmp_path_factory.mktemp("model"))
    with run_server(folder) as running:
        yield running


def word(server: Server, token_id: int) -> str:
    return piece(server, token_id).decode("utf-8", "replace")


def piece(server: Server, token_id: int) -> bytes:
    return server.tokenizer.decoder.pieces(skip_special_tokens=False)[token_id]


def chat_entry(server: Server, token_id: int, place: int, num_top: int) -> dict[str, Any]:
    told = logprobs_of(token_id, place)

    def entry(i: int, x: float) -> dict[str, Any]:
        return {"token": word(server, i), "logprob": x, "bytes": list(piece(server, i))}

    top = [entry(i, x) for i, x in zip(told.top_ids, told.top_logprobs, strict=True)]
    return {**entry(token_id, told.logprob), "top_logprobs": top[:num_top]}


def gathered(frames: list[Any]) -> tuple[str, list[Any]]:
    """The text of a streamed chat and all entries of its logprobs."""
    text, entries = "", []
    for frame in frames:
        for choice in frame["choices"]:
            text += choice["delta"].get("content") or ""
            if choice["logprobs"] is not None:
                assert set(choice["logprobs"]) == {"content"}
                entries += choice["logprobs"]["content"]
    return text, entries


@pytest.mark.parametrize("text", ["Hello world, how are you?", "Fox 😀 漢字 and more"])
@pytest.mark.parametrize("burst", [1, 3, 50])
def test_a_chat(server: Server, text: str, burst: int) -> None:
    token_ids = server.play(text, burst=burst)
    expected = [chat_entry(server, i, place, 2) for place, i in enumerate(token_ids, 1)]
    answer = server.post(CHAT, ASK)
    assert answer["choices"][0]["logprobs"] == {"content": expected}
    assert answer["choices"][0]["message"]["content"] == text
    assert answer["prompt_logprobs"] is None and answer["prompt_token_ids"] is None
    pieces = b"".join(bytes(entry["bytes"]) for entry in expected[:-1])
    assert pieces.decode() == text, "parts of a character are told as bytes"
    server.play(text, burst=burst)
    assert gathered(server.frames(CHAT, ASK)) == (text, expected)


def test_only_the_tokens_of_the_answer(server: Server) -> None:
    (token_id, _) = server.play("a")
    body = {**ASK, "top_logprobs": None}
    (entry, end) = server.post(CHAT, body)["choices"][0]["logprobs"]["content"]
    assert entry == chat_entry(server, token_id, 1, 0) and entry["top_logprobs"] == []
    assert end["token"] == "<|im_end|>"


def test_most_likely_ones_that_are_impossible(server: Server) -> None:
    server.play("a", eos=False)
    body = {**ASK, "top_logprobs": 20, "max_tokens": 1}
    (entry,) = server.post(CHAT, body)["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"][-1]["logprob"] == -9999.0


@pytest.mark.parametrize("burst", [1, 50])
@pytest.mark.parametrize("include", [False, True])
def test_what_a_stop_string_has_cut_is_not_told(server: Server, burst: int, include: bool) -> None:
    token_ids = server.play("The fox jumps, the dog does not.", burst=burst)
    body = {**ASK, "stop": ["ps, the"], "include_stop_str_in_output": include}
    shown = "The fox jumps, the" if include else "The fox jum"
    ends, size = [], 0
    for token_id in token_ids:
        ends.append(size)
        size += len(word(server, token_id))
    num_shown = sum(begin < len(shown) for begin in ends)
    expected = [chat_entry(server, i, p, 2) for p, i in enumerate(token_ids[:num_shown], 1)]
    (choice,) = server.post(CHAT, body)["choices"]
    assert choice["message"]["content"] == shown and choice["stop_reason"] == "ps, the"
    assert choice["logprobs"]["content"] == expected
    server.play("The fox jumps, the dog does not.", burst=burst)
    assert gathered(server.frames(CHAT, body)) == (shown, expected)


def test_a_stop_string_that_never_ends_loses_nothing(server: Server) -> None:
    token_ids = server.play("Hello wor", burst=2)
    body = {**ASK, "stop": ["world"]}
    (choice,) = server.post(CHAT, body)["choices"]
    assert choice["message"]["content"] == "Hello wor"
    assert len(choice["logprobs"]["content"]) == len(token_ids)


def test_each_of_n_choices(server: Server) -> None:
    token_ids = server.play("Hello", burst=9)
    answer = server.post(CHAT, {**ASK, "n": 3, "temperature": 1.0})
    assert len(answer["choices"]) == 3
    for choice in answer["choices"]:
        assert len(choice["logprobs"]["content"]) == len(token_ids)


@pytest.mark.parametrize("num", [0, 1, 3])
def test_a_completion(server: Server, num: int) -> None:
    token_ids = server.play("Hello 😀 you", burst=2)
    body = {"prompt": "x", "logprobs": num}
    (choice,) = server.post(COMPLETIONS, body)["choices"]
    told = choice["logprobs"]
    assert set(told) == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
    assert told["tokens"] == [word(server, i) for i in token_ids]
    entries = [logprobs_of(i, place) for place, i in enumerate(token_ids, 1)]
    assert told["token_logprobs"] == [entry.logprob for entry in entries]
    for i, top, entry in zip(token_ids, told["top_logprobs"], entries, strict=True):
        assert next(iter(top)) == word(server, i), "the token itself comes first"
        assert 1 <= len(top) <= num + 1
        assert set(top) == {word(server, j) for j in [i, *entry.top_ids[:num]]}
    text, visible = choice["text"], told["text_offset"]
    for begin, token in zip(visible, told["tokens"], strict=True):
        assert "\ufffd" in token or text[begin:].startswith(token) or token == "<|im_end|>"
    assert visible == sorted(visible) and visible[0] == 0
    server.play("Hello 😀 you", burst=2)
    joined: dict[str, list[Any]] = {name: [] for name in told}
    for frame in server.frames(COMPLETIONS, body):
        for part in frame["choices"]:
            for name, values in (part["logprobs"] or {}).items():
                joined[name] += values
    assert joined == told


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("as_ids", [False, True])
def test_an_echo_tells_of_the_prompt(
    server: Server, as_ids: bool, max_tokens: int, is_streamed: bool
) -> None:
    """As lm-eval asks for the likelihood of a text."""
    text = "The quick fox 😀 jumps"
    ids = server.tokenizer.encode(text, add_special_tokens=False)
    token_ids = server.play(" over the lazy dog and on and on", eos=False)[:max_tokens]
    body = {
        "prompt": [ids] if as_ids else text, "max_tokens": max_tokens, "logprobs": 1,
        "echo": True, "temperature": 0,
    }  # fmt: skip
    if is_streamed:
        frames = server.frames(COMPLETIONS, body)
        choices = [choice for frame in frames for choice in frame["choices"]]
        shown = "".join(choice["text"] for choice in choices)
        told: dict[str, list[Any]] = {}
        for choice in choices:
            for name, values in (choice["logprobs"] or {}).items():
                told.setdefault(name, []).extend(values)
    else:
        answer = server.post(COMPLETIONS, body)
        (choice,) = answer["choices"]
        shown, told = choice["text"], choice["logprobs"]
        assert answer["usage"]["completion_tokens"] == max_tokens
        assert choice["finish_reason"] == "length"
    assert shown == text + "".join(word(server, i) for i in token_ids)
    assert told["tokens"] == [word(server, i) for i in [*ids, *token_ids]]
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    prompt = [logprobs_of(i, place).logprob for place, i in enumerate(ids[1:], 1)]
    output = [logprobs_of(i, place).logprob for place, i in enumerate(token_ids, 1)]
    assert told["token_logprobs"][1:] == prompt + output
    begin = 0
    for offset, token in zip(told["text_offset"], told["tokens"], strict=True):
        if "\ufffd" not in token:
            assert shown[offset:].startswith(token)
        assert offset >= begin
        begin = offset
    assert told["text_offset"][len(ids) :][:1] in ([], [len(text)])


def test_an_echo_alone_needs_no_engine(server: Server) -> None:
    server.play("x")
    answer = server.post(COMPLETIONS, {"prompt": "Hello", "max_tokens": 0, "echo": True})
    assert answer["choices"][0]["text"] == "Hello" and answer["choices"][0]["logprobs"] is None
    assert not server.engine.submitted


@pytest.mark.parametrize("num", [0, 2])
def test_prompt_logprobs(server: Server, num: int) -> None:
    def check(told: list[Any], ids: list[int]) -> None:
        assert len(told) == len(ids) and told[0] is None
        for place, (i, found) in enumerate(zip(ids[1:], told[1:], strict=True), 1):
            entry = logprobs_of(i, place)
            assert list(found)[0] == str(i)
            assert found[str(i)] == {
                "logprob": entry.logprob, "rank": 2, "decoded_token": word(server, i),
            }  # fmt: skip
            assert set(found) == {str(j) for j in [i, *entry.top_ids[:num]]}
            for other, value in found.items():
                assert value["decoded_token"] == word(server, int(other))

    server.play("Hi")
    answer = server.post(CHAT, {**ASK, "logprobs": None, "top_logprobs": 0, "prompt_logprobs": num})
    check(answer["prompt_logprobs"], server.engine.submitted[-1].prompt)
    assert answer["choices"][0]["logprobs"] is None
    server.play("Hi")
    prompts = ["The quick brown fox", "Hello"]
    answer = server.post(COMPLETIONS, {"prompt": prompts, "prompt_logprobs": num})
    for choice, prompt in zip(answer["choices"], prompts, strict=True):
        check(choice["prompt_logprobs"], server.tokenizer.encode(prompt, add_special_tokens=True))
        assert choice["logprobs"] is None


def test_token_ids(server: Server) -> None:
    token_ids = server.play("Hello 😀 you", burst=2)
    body = {"messages": ASK["messages"], "return_token_ids": True}
    answer = server.post(CHAT, body)
    assert answer["choices"][0]["token_ids"] == token_ids
    assert answer["prompt_token_ids"] == server.engine.submitted[-1].prompt
    assert answer["choices"][0]["logprobs"] is None
    server.play("Hello 😀 you", burst=2)
    first, *frames = server.frames(CHAT, body)
    assert first["prompt_token_ids"] == server.engine.submitted[-1].prompt
    assert sum((f["choices"][0]["token_ids"] or [] for f in frames), []) == token_ids
    server.play("Hello 😀 you", burst=2)
    text = {"prompt": "abc", "return_token_ids": True, "echo": True}
    (choice,) = server.post(COMPLETIONS, text)["choices"]
    assert choice["token_ids"] == token_ids
    assert choice["prompt_token_ids"] == server.engine.submitted[-1].prompt
    server.play("Hello 😀 you", burst=2)
    choices = [frame["choices"][0] for frame in server.frames(COMPLETIONS, text)]
    assert choices[0]["prompt_token_ids"] == server.engine.submitted[-1].prompt
    assert all(choice["prompt_token_ids"] is None for choice in choices[1:])
    assert sum((choice["token_ids"] for choice in choices), []) == token_ids


def test_tokens_by_id(server: Server, tmp_path: Any) -> None:
    token_ids = server.play("Hello", burst=2)
    body = {**ASK, "return_tokens_as_token_ids": True}
    content = server.post(CHAT, body)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [f"token_id:{i}" for i in token_ids]
    assert content[0]["bytes"] == list(piece(server, token_ids[0]))
    with run_server(make_tokenizer_folder(tmp_path / "m"), return_tokens_as_token_ids=True) as own:
        own.play("Hello")
        text = {"prompt": "x", "logprobs": 1, "max_tokens": 1}
        by_id, by_text = f"token_id:{token_ids[0]}", word(own, token_ids[0])
        for asked, token in ((None, by_id), (False, by_text)):
            found = own.post(COMPLETIONS, {**text, "return_tokens_as_token_ids": asked})
            assert found["choices"][0]["logprobs"]["tokens"] == [token]


def test_the_engine_is_asked_for_what_is_shown(server: Server) -> None:
    for path, body, asked in (
        (CHAT, ASK, (2, None)),
        (CHAT, {**ASK, "logprobs": False}, (None, None)),
        (CHAT, {**ASK, "logprobs": None, "top_logprobs": 0}, (None, None)),
        (CHAT, {**ASK, "prompt_logprobs": 1}, (2, 1)),
        (COMPLETIONS, {"prompt": "x", "logprobs": False}, (None, None)),
        (COMPLETIONS, {"prompt": "x", "logprobs": 0}, (0, None)),
        (COMPLETIONS, {"prompt": "x", "logprobs": 2, "echo": True}, (2, 2)),
        (COMPLETIONS, {"prompt": "x", "return_token_ids": True}, (None, None)),
    ):
        server.play("Hi")
        server.post(path, body)
        params = server.engine.submitted[-1].params
        assert (params.num_logprobs, params.num_prompt_logprobs) == asked


@pytest.mark.parametrize(
    ("path", "fields", "param", "words"),
    [
        (
            CHAT,
            {"top_logprobs": 21},
            "top_logprobs",
            "in [0, 20] (--max-logprobs), got 21",
        ),
        (CHAT, {"top_logprobs": -1}, "top_logprobs", "got -1"),
        (CHAT, {"logprobs": None}, "top_logprobs", "top_logprobs needs logprobs: true"),
        (CHAT, {"prompt_logprobs": 21}, "prompt_logprobs", "must be in [0, 20]"),
        (CHAT, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs", "needs stream: false"),
        (COMPLETIONS, {"logprobs": 21}, "logprobs", "must be in [0, 20]"),
        (COMPLETIONS, {"logprobs": -1}, "logprobs", "got -1"),
        (COMPLETIONS, {"logprobs": True}, "logprobs", "must be a number of tokens, got true"),
        (COMPLETIONS, {"logprobs": 1, "max_tokens": 0}, "max_tokens", "must be at least 1"),
    ],
)
def test_refusals(
    server: Server, path: str, fields: dict[str, Any], param: str, words: str
) -> None:
    body = {**ASK, **fields} if path == CHAT else {"prompt": "x", **fields}
    error = server.error(path, body)
    assert error["param"] == param and words in error["message"]


def test_what_is_told_of_prompts_is_bounded(server: Server) -> None:
    """Each token of a prompt costs a kilobyte, and it costs a client next to nothing to send."""
    server.play("Hi")
    prompts = [[5] * 400] * 200
    for fields, param in (
        ({"logprobs": 20, "echo": True}, "logprobs"),
        ({"prompt_logprobs": 20}, "prompt_logprobs"),
    ):
        error = server.error(COMPLETIONS, {"prompt": prompts, "max_tokens": 1, **fields})
        assert error["param"] == param
        assert "80000 prompt tokens times n 1 times 21 logprobs" in error["message"]
    assert not server.engine.submitted
    server.post(COMPLETIONS, {"prompt": prompts[:4], "max_tokens": 1, "prompt_logprobs": 20})


def test_what_asks_for_nothing_is_named(server: Server) -> None:
    for fields, named in (
        ({"logprobs": False, "top_logprobs": 5}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
    ):
        server.play("Hi")
        body = {"messages": ASK["messages"], **fields}
        status, headers, _ = server.request("POST", CHAT, body)
        assert status == 200 and headers.get("x-pyserve-ignored") == named


def test_the_servers_own_limit(tmp_path: Any) -> None:
    with run_server(make_tokenizer_folder(tmp_path), max_logprobs=3) as own:
        own.play("Hi")
        assert own.error(CHAT, {**ASK, "top_logprobs": 4})["param"] == "top_logprobs"
        own.post(CHAT, {**ASK, "top_logprobs": 3})


def test_logits_are_not_compared(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.engine, "info", replace(server.engine.info, has_logits=True))
    server.play("Hello")
    asked: list[dict[str, Any]] = [{"best_of": 2}, {"n": 2, "use_beam_search": True}]
    for fields in asked:
        error = server.error(COMPLETIONS, {"prompt": "x", "max_tokens": 9, **fields})
        assert error["param"] in fields and "--logprobs-mode raw_logprobs" in error["message"]
    assert server.post(CHAT, {**ASK, "n": 2, "best_of": 2})["choices"][1]["logprobs"]


@pytest.mark.parametrize("burst", [1, 3, 50])
def test_thinking_and_calls_tell_of_every_token_once(tmp_path: Any, burst: int) -> None:
    """Markers are tokens of the answer, too, though no text shows them."""
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    text = f"<think>One, two.</think>Well: {call}"
    function = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    flags: dict[str, Any] = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}
    folder = make_tokenizer_folder(tmp_path / "m")
    config = folder / "tokenizer_config.json"
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + TEMPLATE
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": template}))
    with run_server(folder, **flags, enable_auto_tool_choice=True) as own:
        for body in (ASK, {**ASK, "tools": [function]}):
            token_ids = own.play(text, burst=burst)
            expected = [chat_entry(own, i, place, 2) for place, i in enumerate(token_ids, 1)]
            (choice,) = own.post(CHAT, body)["choices"]
            assert choice["message"]["reasoning"] == "One, two."
            assert choice["logprobs"]["content"] == expected
            own.play(text, burst=burst)
            assert gathered(own.frames(CHAT, body))[1] == expected


def test_the_sdk_reads_them(server: Server) -> None:
    token_ids = server.play("Hello")
    answer = server.sdk().chat.completions.create(
        model="org/tiny", messages=[{"role": "user", "content": "x"}], logprobs=True,
        top_logprobs=1,
    )  # fmt: skip
    told = answer.choices[0].logprobs
    assert told is not None and told.content is not None
    assert [entry.bytes for entry in told.content] == [list(piece(server, i)) for i in token_ids]
