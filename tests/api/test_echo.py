"""`echo`, `truncate_prompt_tokens` and `continuous_usage_stats`, streamed and whole."""

from __future__ import annotations

from typing import Any

import pytest

from pyserve.api.endpoints import openai, prompts
from pyserve.api.endpoints.prompts import Truncation
from tests.api.fakes import CONTEXT, MODEL, Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


def streamed(server: Server, body: dict[str, Any], path: str = COMPLETIONS) -> dict[int, str]:
    """Text by choice."""
    texts: dict[int, str] = {}
    for frame in server.frames(path, body):
        for choice in frame["choices"]:
            text = choice["text"] if path == COMPLETIONS else choice["delta"]["content"]
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("The fox 漢", ["The fox 漢"]),
        (["a ", "b "], ["a ", "b "]),
        ("<|im_start|>x", ["<|im_start|>x"]),
    ],
)
@pytest.mark.parametrize("n", [1, 2])
def test_the_prompt_stands_in_front(server: Server, prompt: Any, texts: list[str], n: int) -> None:
    server.play("Hello")
    body = {"prompt": prompt, "echo": True, "n": n}
    whole = server.post(COMPLETIONS, body)
    expected = {i: texts[i // n] + "Hello" for i in range(n * len(texts))}
    assert {c["index"]: c["text"] for c in whole["choices"]} == expected
    assert streamed(server, body) == expected
    usage = whole["usage"]
    num_prompt_tokens = sum(len(item.prompt) for item in server.engine.submitted[: n * len(texts)])
    assert usage["prompt_tokens"] * n == num_prompt_tokens


def test_token_ids_are_echoed_as_their_text(server: Server) -> None:
    ids = server.tokenizer.encode("<|im_start|>quick 😀", add_special_tokens=False)
    server.play("Hello")
    body: dict[str, Any] = {"prompt": ids, "echo": True}
    assert server.post(COMPLETIONS, body)["choices"][0]["text"] == "quick 😀Hello"
    body |= {"skip_special_tokens": False, "prompt": [ids, ids]}
    choices = server.post(COMPLETIONS, body)["choices"]
    assert [c["text"].removesuffix("<|im_end|>") for c in choices] == ["<|im_start|>quick 😀Hello"
                                                                      ] * 2  # fmt: skip


def test_a_stop_string_in_the_prompt_ends_nothing(server: Server) -> None:
    server.play("Hello world")
    body = {"prompt": "stop wor", "echo": True, "stop": ["wor", "stop"]}
    choice = server.post(COMPLETIONS, body)["choices"][0]
    assert choice["text"] == "stop worHello " and choice["stop_reason"] == "wor"


def test_echo_alone_generates_nothing(server: Server) -> None:
    body = {"prompt": ["a b", "c"], "echo": True, "max_tokens": 0, "n": 2}
    whole = server.post(COMPLETIONS, body)
    assert [c["text"] for c in whole["choices"]] == ["a b", "a b", "c", "c"]
    assert {c["finish_reason"] for c in whole["choices"]} == {"length"}
    assert whole["usage"]["completion_tokens"] == 0 and whole["usage"]["prompt_tokens"] >= 3
    assert streamed(server, body) == {0: "a b", 1: "a b", 2: "c", 3: "c"}
    assert server.engine.submitted == []
    error = server.error(COMPLETIONS, {"prompt": "a", "max_tokens": 0})
    assert error["param"] == "max_tokens"


def test_what_echo_shows_is_bounded(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "MAX_ECHO_CHARS", 100)
    body = {"prompt": "x" * 26, "echo": True, "n": 4}
    error = server.error(COMPLETIONS, body)
    assert error["param"] == "echo" and "104" in error["message"] and "100" in error["message"]
    assert server.engine.submitted == []
    server.post(COMPLETIONS, body | {"prompt": "x" * 25})


def test_a_chat_echoes_what_the_assistant_has_said(server: Server) -> None:
    server.play(" world")
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": ["Hello", {"type": "text", "text": "-"}]},
    ]
    body = {"messages": messages, "echo": True, "continue_final_message": True}
    assert server.post(CHAT, body)["choices"][0]["message"]["content"] == "Hello\n- world"
    assert streamed(server, body, CHAT) == {0: "Hello\n- world"}
    status, headers, reply = server.request("POST", CHAT, {"messages": MESSAGES, "echo": True})
    assert status == 200 and headers["x-pyserve-ignored"] == "echo"
    assert b'"content":" world"' in reply


def test_a_suffix_is_refused(server: Server) -> None:
    error = server.error(COMPLETIONS, {"prompt": "a", "suffix": "b"})
    assert error["param"] == "suffix" and "not built" in error["message"]
    server.post(COMPLETIONS, {"prompt": "a", "suffix": ""})


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_usage_in_every_frame(server: Server, path: str) -> None:
    server.play("Hello world")
    prompt = {"prompt": "hi"} if path == COMPLETIONS else {"messages": MESSAGES}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *frames, last = server.frames(path, {**prompt, "n": 2, "stream_options": options})
    num_prompt_tokens = len(server.engine.submitted[0].prompt)
    counts: dict[int, list[int]] = {0: [], 1: []}
    for frame in frames:
        usage = frame["usage"]
        assert usage["prompt_tokens"] == num_prompt_tokens
        assert usage["total_tokens"] == num_prompt_tokens + usage["completion_tokens"]
        counts[frame["choices"][0]["index"]].append(usage["completion_tokens"])
    for mine in counts.values():
        assert mine == sorted(mine) and mine[0] == (0 if path == CHAT else 1)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == sum(mine[-1] for mine in counts.values())


def test_continuous_usage_needs_usage(server: Server) -> None:
    body = {
        "messages": MESSAGES,
        "stream": True,
        "stream_options": {"continuous_usage_stats": True},
    }
    _, headers, reply = server.request("POST", CHAT, body)
    assert headers["x-pyserve-ignored"] == "stream_options.continuous_usage_stats"
    assert b'"usage"' not in reply


def test_truncation_keeps_one_end(server: Server) -> None:
    ids = list(range(80, 120))
    text = "The quick brown fox jumps over the lazy dog. " * 3
    whole = server.tokenizer.encode(text, add_special_tokens=True)
    for prompt, tokens in ((ids, ids), ([ids, ids], ids), (text, whole)):
        for side, kept in ((None, tokens[-7:]), ("left", tokens[-7:]), ("right", tokens[:7])):
            server.engine.submitted.clear()
            body = {"prompt": prompt, "truncate_prompt_tokens": 7, "truncation_side": side}
            answer = server.post(COMPLETIONS, {**body, "echo": True})
            assert {tuple(item.prompt) for item in server.engine.submitted} == {tuple(kept)}
            assert answer["usage"]["prompt_tokens"] == 7 * len(server.engine.submitted)
            shown = server.tokenizer.decode(kept, skip_special_tokens=True)
            assert answer["choices"][0]["text"] == shown + "Hello"
    server.post(COMPLETIONS, {"prompt": ids, "truncate_prompt_tokens": CONTEXT})
    assert server.engine.submitted[-1].prompt == ids


def test_truncation_to_what_leaves_room(server: Server) -> None:
    ids = [80] * (3 * CONTEXT)
    for max_tokens, kept in ((None, CONTEXT - 16), (10, CONTEXT - 10)):
        body = {"prompt": ids, "truncate_prompt_tokens": -1, "max_tokens": max_tokens}
        server.post(COMPLETIONS, body)
        assert len(server.engine.submitted[-1].prompt) == kept
    messages = [{"role": "user", "content": "word " * 2000}]
    server.post(CHAT, {"messages": messages, "truncate_prompt_tokens": -1})
    assert len(server.engine.submitted[-1].prompt) == CONTEXT - 1
    body = {"messages": messages, "truncate_prompt_tokens": -1, "max_completion_tokens": 9}
    tokens = server.post(CHAT, body)["usage"]["prompt_tokens"]
    assert tokens == CONTEXT - 9
    everything = server.post("/tokenize", {"prompt": "word " * 2000})["tokens"]
    body = {"prompt": "word " * 2000, "truncate_prompt_tokens": 5}
    assert server.post("/tokenize", body)["tokens"] == everything[-5:]
    body = {"messages": messages, "truncate_prompt_tokens": 5}
    ends = server.post("/tokenize", body)["tokens"]
    assert ends == server.post("/tokenize", {"messages": MESSAGES})["tokens"][-5:]


@pytest.mark.parametrize("value", [0, -2, CONTEXT + 1])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_truncation_out_of_range(server: Server, path: str, value: int) -> None:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    error = server.error(path, {**prompt, "truncate_prompt_tokens": value})
    assert error["param"] == "truncate_prompt_tokens"
    assert str(CONTEXT) in error["message"] and f"got {value}" in error["message"]
    error = server.error(path, {**prompt, "truncate_prompt_tokens": 1, "truncation_side": "up"})
    assert error["param"] == "truncation_side" and "up" in error["message"]
    assert server.engine.submitted == []


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_a_side_without_truncation_is_named(server: Server, path: str) -> None:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    _, headers, _ = server.request("POST", path, {**prompt, "truncation_side": "left"})
    assert headers["x-pyserve-ignored"] == "truncation_side"


def test_truncation_does_not_lift_the_bound_on_text(server: Server) -> None:
    body = {"prompt": "word " * 400_000, "truncate_prompt_tokens": 5}
    error = server.error(COMPLETIONS, body)
    assert error["param"] == "prompt" and str(prompts.MAX_TOKENIZE_CHARS) in error["message"]
    error = server.error(COMPLETIONS, {**body, "prompt": ["word " * 100_000] * 4})
    assert error["param"] == "prompt" and "2000000 characters" in error["message"]
    body = {"messages": [{"role": "user", "content": body["prompt"]}], "truncate_prompt_tokens": 5}
    assert server.error(CHAT, body)["param"] == "messages"


class WithBos:
    """A tokenizer that puts 1 before and 2 behind."""

    def surroundings(self) -> tuple[list[int], list[int]]:
        return [1], [2]


def test_special_tokens_around_a_text_survive() -> None:
    ids = [1, 10, 11, 12, 13, 2]
    for limit, is_start_kept, kept in (
        (4, False, [1, 12, 13, 2]), (4, True, [1, 10, 11, 2]), (6, False, ids), (9, False, ids),
        (3, False, [1, 13, 2]), (2, False, [13, 2]), (1, True, [1]),
    ):  # fmt: skip
        cut = Truncation(limit, is_start_kept)
        assert cut.cut_text(WithBos(), ids, has_special_tokens=True) == kept  # type: ignore[arg-type]
    assert Truncation(2, False).cut_text(WithBos(), ids, has_special_tokens=False) == [13, 2]  # type: ignore[arg-type]


def test_through_the_sdk(server: Server) -> None:
    server.play("Hello")
    with server.sdk() as sdk:
        whole = sdk.completions.create(model=MODEL, prompt="hi ", echo=True, max_tokens=9)
        assert whole.choices[0].text == "hi Hello"
        stream = sdk.completions.create(
            model=MODEL, prompt="hi ", echo=True, stream=True, user="me",
            stream_options={"include_usage": True},
            extra_body={"truncate_prompt_tokens": 1},
        )  # fmt: skip
        text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert text == server.tokenizer.decode(server.engine.submitted[-1].prompt,
                                           skip_special_tokens=True) + "Hello"  # fmt: skip
