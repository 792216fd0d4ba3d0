"""/v1/completions over HTTP: every form of a prompt, several prompts times n, refusals."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.fakes import CONTEXT, MODEL, PADDED_VOCAB, Script, Server

PATH = "/v1/completions"


def test_a_whole_answer(server: Server) -> None:
    ids = server.play("Hello")
    answer = server.post(PATH, {"prompt": "hi"})
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    prompt = server.tokenizer.encode("hi", add_special_tokens=True)
    assert server.engine.submitted[0].prompt == prompt
    assert answer == {
        "object": "text_completion", "model": MODEL,
        "choices": [{
            "index": 0, "text": "Hello", "logprobs": None, "finish_reason": "stop",
            "stop_reason": None, "token_ids": None, "prompt_logprobs": None,
            "prompt_token_ids": None,
        }],
        "service_tier": None, "system_fingerprint": "pyserve-0.1.0",
        "usage": {
            "prompt_tokens": len(prompt), "total_tokens": len(prompt) + len(ids),
            "completion_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": 0},
        },
        "kv_transfer_params": None,
    }  # fmt: skip


def test_the_stream_is_the_same_answer(server: Server) -> None:
    server.play("Hello world")
    whole = server.post(PATH, {"prompt": "hi"})
    server.play("Hello world")
    body = {"prompt": "hi", "stream_options": {"include_usage": True}}
    *frames, usage = server.frames(PATH, body)
    keys = {
        "index", "text", "logprobs", "finish_reason", "stop_reason", "prompt_token_ids",
        "token_ids",
    }  # fmt: skip
    assert all(frame["choices"][0].keys() == keys for frame in frames)
    assert "".join(frame["choices"][0]["text"] for frame in frames) == "Hello world"
    reasons = [frame["choices"][0]["finish_reason"] for frame in frames]
    assert reasons[-1] == "stop" and not any(reasons[:-1])
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("hi", ["hi"]),
        (["hi", "Hello"], ["hi", "Hello"]),
        ([80, 81], [[80, 81]]),
        ([[80, 81], [82]], [[80, 81], [82]]),
    ],
)
def test_forms_of_a_prompt(server: Server, prompt: Any, sent: list[Any]) -> None:
    answer = server.post(PATH, {"prompt": prompt})
    expected = [
        server.tokenizer.encode(one, add_special_tokens=True) if isinstance(one, str) else one
        for one in sent
    ]
    assert [item.prompt for item in server.engine.submitted] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(sent)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


def test_choices_of_several_prompts(server: Server) -> None:
    """Index prompt * n + sample; a prompt counts once in usage."""
    texts = ["quick", "brown", "fox", "jumps"]
    encoded = [server.tokenizer.encode(text, add_special_tokens=False) for text in texts]
    server.engine.script = lambda number: Script([*encoded[number % 4], 2])
    body = {"prompt": [[80], [81, 82]], "n": 2, "stream_options": {"include_usage": True}}
    frames = server.frames(PATH, body)
    for index, text in enumerate(texts):
        mine = [c["text"] for f in frames for c in f["choices"] if c["index"] == index]
        assert "".join(mine) == text
    assert frames[-1]["usage"]["prompt_tokens"] == 3
    samples = [(item.prompt, item.params.sample_index) for item in server.engine.submitted]
    assert samples == [([80], 0), ([80], 1), ([81, 82], 0), ([81, 82], 1)]
    server.engine.submitted.clear()
    whole = server.post(PATH, {"prompt": [[80], [81, 82]], "n": 2})
    assert [choice["text"] for choice in whole["choices"]] == texts


def test_default_max_tokens(server: Server) -> None:
    server.play("Hello world", eos=False)
    server.post(PATH, {"prompt": "hi"})
    assert server.engine.submitted[-1].params.max_tokens == 16
    server.post(PATH, {"prompt": "hi", "max_tokens": None})
    assert server.engine.submitted[-1].params.max_tokens == 16
    server.post(PATH, {"prompt": [80] * (CONTEXT - 5)})
    assert server.engine.submitted[-1].params.max_tokens == 5


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "missing"),
    ({"prompt": None}, "missing"),
    ({"prompt": ""}, "must not be empty"),
    ({"prompt": []}, "got 0"),
    ({"prompt": [""]}, "must not be empty"),
    ({"prompt": ["a", ""]}, "must not be empty"),
    ({"prompt": [[]]}, "must not be empty"),
    ({"prompt": [1, "a"]}, "must not mix"),
    ({"prompt": [[1], 2]}, "must not mix"),
    ({"prompt": [-1]}, "token id -1"),
    ({"prompt": [PADDED_VOCAB]}, f"[0, {PADDED_VOCAB - 1}]"),
    ({"prompt": [[5], [2**80]]}, "ids must be in"),
    ({"prompt": ["a"] * 2049}, "2048"),
    ({"prompt": [80] * CONTEXT}, f"the prompt has {CONTEXT}"),
    ({"prompt": "word " * 2000}, str(CONTEXT)),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), BAD, ids=range(len(BAD)))
def test_bad_prompts(server: Server, body: dict[str, Any], words: str) -> None:
    error = server.error(PATH, body)
    assert error["param"] == "prompt" and words in error["message"]
    assert server.engine.submitted == []


def test_wrong_element_types_name_the_place(server: Server) -> None:
    assert server.error(PATH, {"prompt": [1.5]})["param"] == "prompt[0]"
    assert server.error(PATH, {"prompt": {"a": 1}})["param"] == "prompt"


def test_too_many_sequences(server: Server) -> None:
    error = server.error(PATH, {"prompt": ["a"] * 17, "n": 128})
    assert error["param"] == "n" and "2048" in error["message"]
    assert server.engine.submitted == []


def test_one_bad_prompt_refuses_all(server: Server) -> None:
    server.error(PATH, {"prompt": [[80], [80] * CONTEXT]})
    assert server.engine.submitted == []


def test_special_tokens_around_the_prompt_can_be_left_out(server: Server) -> None:
    server.post(PATH, {"prompt": "hi", "add_special_tokens": False})
    assert server.engine.submitted[0].prompt == server.tokenizer.encode(
        "hi", add_special_tokens=False
    )
