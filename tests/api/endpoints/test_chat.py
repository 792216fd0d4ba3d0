"""/v1/chat/completions over HTTP: prompt, answer, chunk shapes, refusals."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from pytest import MonkeyPatch

from tests.api.fakes import CONTEXT, MODEL, Script, Server

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def ask(**fields: Any) -> dict[str, Any]:
    return {"messages": MESSAGES, **fields}


def test_a_whole_answer(server: Server) -> None:
    ids = server.play("Hello 😀")
    server.engine.num_cached_tokens = 5
    answer = server.post(PATH, ask(model=MODEL, user="me"))
    prompt = server.engine.submitted[0].prompt
    assert prompt == server.tokenizer.encode(PROMPT, add_special_tokens=False)
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer == {
        "object": "chat.completion", "model": MODEL,
        "choices": [{
            "index": 0,
            "message": {
                "role": "assistant", "content": "Hello 😀", "refusal": None, "annotations": None,
                "audio": None, "function_call": None, "reasoning": None, "reasoning_content": None,
            },
            "logprobs": None, "finish_reason": "stop", "stop_reason": None, "token_ids": None,
        }],
        "service_tier": None, "system_fingerprint": "pyserve-0.1.0",
        "usage": {
            "prompt_tokens": len(prompt), "total_tokens": len(prompt) + len(ids),
            "completion_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": 5},
        },
        "prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None,
        "kv_transfer_params": None,
    }  # fmt: skip


def test_the_stream_is_the_same_answer(server: Server) -> None:
    server.play("Hello 😀")
    whole = server.post(PATH, ask(request_id="r1"))
    server.play("Hello 😀")
    frames = server.frames(PATH, ask(request_id="r1", stream_options={"include_usage": True}))
    assert {frame["id"] for frame in frames} == {"chatcmpl-r1"} == {whole["id"]}
    assert {frame["object"] for frame in frames} == {"chat.completion.chunk"}
    assert len({frame["created"] for frame in frames}) == 1
    role, *deltas, finish, usage = frames
    assert role["choices"] == [{
        "index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
        "finish_reason": None,
    }]  # fmt: skip
    for frame in deltas:
        assert "usage" not in frame
        (choice,) = frame["choices"]
        assert choice["delta"].keys() == {"content"} and choice["finish_reason"] is None
        assert "stop_reason" not in choice
    (choice,) = finish["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)
    text = "".join(frame["choices"][0]["delta"]["content"] for frame in [*deltas, finish])
    assert text == whole["choices"][0]["message"]["content"] == "Hello 😀"
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]


def test_the_prompt_is_told_as_the_model_gets_it(server: Server) -> None:
    for n in (1, 2):
        asked = ask(return_prompt_text=True, n=n)
        assert server.post(PATH, asked)["prompt_text"] == PROMPT
        roles = [f for f in server.frames(PATH, asked) if "role" in f["choices"][0]["delta"]]
        assert [role["prompt_text"] for role in roles] == [PROMPT] * n
    assert server.frames(PATH, ask(return_prompt_text=False))[0]["prompt_text"] is None


def test_no_usage_chunk_unless_asked(server: Server) -> None:
    assert all("usage" not in frame for frame in server.frames(PATH, ask()))


def test_tokens_that_gather_are_one_frame(server: Server) -> None:
    server.play("Hello world, how are you?", burst=100)
    assert len(server.frames(PATH, ask())) == 2  # the role, and all text with the finish reason


def test_n_choices_in_one_stream(server: Server) -> None:
    texts = ["Hello", "quick brown", "lazy"]
    encoded = [server.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    server.engine.script = lambda number: Script([*encoded[number], 2])
    server.engine.submitted.clear()
    frames = server.frames(PATH, ask(n=3, stream_options={"include_usage": True}))
    roles = [frame["choices"][0] for frame in frames[:3]]
    assert [choice["index"] for choice in roles] == [0, 1, 2]
    assert all(choice["delta"]["role"] == "assistant" for choice in roles)
    for index, text in enumerate(texts):
        mine = [c for f in frames[3:] for c in f["choices"] if c["index"] == index]
        assert "".join(choice["delta"]["content"] for choice in mine) == text
        assert [choice["finish_reason"] for choice in mine].count("stop") == 1
    prompt_tokens = frames[-1]["usage"]["prompt_tokens"]
    assert prompt_tokens == len(server.engine.submitted[0].prompt)


def test_parts_and_names_reach_the_template(server: Server) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": parts, "name": "joe"},
        {"role": "assistant", "content": "x"}, {"role": "user", "content": ""},
    ]  # fmt: skip
    server.post(PATH, {"messages": messages})
    text = server.tokenizer.decode(server.engine.submitted[0].prompt, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
        "<|im_start|>assistant\nx<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_developer_and_null_content(server: Server) -> None:
    messages = [
        {"role": "developer", "content": "d"}, {"role": "user", "content": ["u", "v"]},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]  # fmt: skip
    server.post(PATH, {"messages": messages})
    text = server.tokenizer.decode(server.engine.submitted[0].prompt, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nd<|im_end|>\n<|im_start|>user\nu\nv<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_special_tokens_are_added_on_request(server: Server, monkeypatch: MonkeyPatch) -> None:
    seen = []
    encode_chat = server.tokenizer.encode_chat

    def spy(prompt: str, *, add_special_tokens: bool, max_tokens: int) -> list[int]:
        seen.append(add_special_tokens)
        return encode_chat(prompt, add_special_tokens=add_special_tokens, max_tokens=max_tokens)

    monkeypatch.setattr(server.tokenizer, "encode_chat", spy)
    for path in (PATH, "/tokenize"):
        for value in (None, False, True):
            server.post(path, ask(add_special_tokens=value))
    assert seen == [False, False, True] * 2


def test_control_tokens_in_user_text_stay_text(server: Server) -> None:
    server.post(PATH, {"messages": [{"role": "user", "content": "<|im_end|>"}]})
    end = server.tokenizer.token_to_id("<|im_end|>")
    assert end is not None and server.engine.submitted[0].prompt.count(end) == 1


def test_max_tokens_is_what_is_left(server: Server) -> None:
    server.post(PATH, ask())
    item = server.engine.submitted[0]
    assert item.params.max_tokens == CONTEXT - len(item.prompt)
    server.post(PATH, ask(max_tokens=9, max_completion_tokens=7))
    assert server.engine.submitted[1].params.max_tokens == 7


def test_priority_and_salt_reach_the_engine(server: Server) -> None:
    status, headers, _ = server.request("POST", PATH, ask(priority=-3, cache_salt="s", foo=1))
    assert status == 200
    assert headers["x-pyserve-ignored"] == "foo, priority"  # the fake schedules first come first
    item = server.engine.submitted[0]
    assert (item.priority, item.cache_salt) == (-3, "s")


def test_fields_without_effect_are_named_in_a_stream_too(server: Server) -> None:
    _, headers, _ = server.request("POST", PATH, ask(stream=True, user="u", store=True))
    assert headers["x-pyserve-ignored"] == "store, user"


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "got 0"),
    ({"messages": [{"role": "user", "content": "x"}] * 4097}, "messages", "4096"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "wizard"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].name", "is missing"),
    ({"messages": [{"role": "user<|im_end|>", "content": "x"}]}, "messages[0].role", "must be one"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "null"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "null"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
     "messages[0].content[0].type", "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]},
     "messages[0].content[0].text", "string"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 8193}] * 2},
     "messages", "16384"),
    (ask(n=129), "n", "128"),
    (ask(cache_salt=""), "cache_salt", "512"),
    (ask(request_id="x" * 513), "request_id", "512"),
    (ask(priority=2**31), "priority", "2147483647"),
    (ask(max_tokens=0), "max_tokens", "at least 1"),
    (ask(temperature=9), "temperature", "[0, 2]"),
    ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages", str(CONTEXT)),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "words"), BAD, ids=[case[1] for case in BAD])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_refusals_come_before_the_status(
    server: Server, body: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    error = server.error(PATH, {"stream": stream, **body})
    assert error["param"] == param and words in error["message"]
    assert error["type"] == "BadRequestError"
    assert server.engine.submitted == []


def test_stream_options_without_a_stream_are_named(server: Server) -> None:
    """A whole answer has what they can ask for."""
    for options in ({}, {"include_usage": True}, {"continuous_usage_stats": True}):
        status, headers, reply = server.request("POST", PATH, ask(stream_options=options))
        assert status == 200 and json.loads(reply)["usage"]["completion_tokens"]
        assert headers["x-pyserve-ignored"] == "stream_options"
    _, headers, _ = server.request("POST", PATH, ask(stream_options=None))
    assert "x-pyserve-ignored" not in headers


def test_a_salt_without_a_prefix_cache_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = dataclasses.replace(server.engine.info, enable_prefix_caching=False)
    monkeypatch.setattr(server.engine, "info", info)
    _, headers, _ = server.request("POST", PATH, ask(cache_salt="s"))
    assert headers["x-pyserve-ignored"] == "cache_salt"


def test_tools_that_may_not_be_used_stay_out_of_the_prompt(server: Server) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    fields = {"tools": tools, "tool_choice": "none", "parallel_tool_calls": False}
    for path in (PATH, "/tokenize"):
        status, headers, reply = server.request("POST", path, ask(**fields))
        assert status == 200, reply
        assert headers["x-pyserve-ignored"] == "parallel_tool_calls, tools"
    server.post(PATH, ask())
    assert server.engine.submitted[0].prompt == server.engine.submitted[1].prompt


def test_unknown_model_is_404_and_the_alias_is_served(server: Server) -> None:
    error = server.error(PATH, ask(model="nobody"), status=404)
    assert error["param"] == "model" and "`nobody` does not exist" in error["message"]
    assert server.post(PATH, ask(model="alias"))["model"] == MODEL
    assert server.post(PATH, ask(model=""))["model"] == MODEL


def test_stop_reasons_in_the_stream(server: Server) -> None:
    server.play("Hello world")
    finish = server.frames(PATH, ask(stop=["wor"]))[-1]["choices"][0]
    assert (finish["finish_reason"], finish["stop_reason"]) == ("stop", "wor")
    server.play("Hello", eos=False)
    stop_id = server.tokenizer.encode("Hello", add_special_tokens=False)[-1]
    finish = server.frames(PATH, ask(stop_token_ids=[stop_id]))[-1]["choices"][0]
    assert (finish["finish_reason"], finish["stop_reason"]) == ("stop", stop_id)


def test_extra_eos_of_the_model_is_an_int_reason(server: Server) -> None:
    server.engine.script = lambda number: Script([9, 0])  # GenerationDefaults of the fixture
    choice = server.post(PATH, ask())["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", 0)
    server.engine.script = lambda number: Script([9, 0, 2, 10])
    choice = server.post(PATH, ask(ignore_eos=True, max_tokens=4))["choices"][0]
    assert choice["finish_reason"] == "length"


def test_special_tokens_are_shown_on_request(server: Server) -> None:
    server.play("Hello<|im_start|>", eos=False)
    hidden = server.post(PATH, ask(max_tokens=3))["choices"][0]["message"]["content"]
    shown = server.post(PATH, ask(max_tokens=3, skip_special_tokens=False))
    assert hidden == "Hello"
    assert shown["choices"][0]["message"]["content"] == "Hello<|im_start|>"


def test_the_long_way_through_a_thread(server: Server) -> None:
    words = "漢" * 4100
    error = server.error(PATH, {"messages": [{"role": "user", "content": words}]})
    assert str(CONTEXT) in error["message"] and error["param"] == "messages"


def test_the_body_is_utf8_json(server: Server) -> None:
    server.play("ñ")
    _, _, reply = server.request("POST", PATH, ask())
    assert "ñ".encode() in reply and json.loads(reply)
