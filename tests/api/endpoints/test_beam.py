"""Beam search and best_of over HTTP: what is asked for, what it answers, what it refuses."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pyserve.api.endpoints.beam import CONSTRAINING, read_beam
from pyserve.api.generation.job import BeamSearch
from pyserve.api.wire.protocol import ChatRequest
from pyserve.api.wire.tools import Tool
from pyserve.client import SequenceStream, TokenLogprobs
from pyserve.constraints import unconstrained
from tests.api.fakes import FakeEngine, Script, Server, Submitted, run_server
from tests.api.likely import LikelyEngine, made_up, plain_beam_search
from tests.waiting import wait_until

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
EOS = (2, 0)  # the tokenizer's and the model's
PROMPT = [60, 61, 62]
MESSAGES = [{"role": "user", "content": "Hi"}]
BEAM: dict[str, Any] = {"prompt": PROMPT, "use_beam_search": True, "n": 3, "max_tokens": 5}


@pytest.fixture(scope="module")
def served(tokenizer_folder: Path) -> Iterator[Server]:
    engine = LikelyEngine(lambda number: Script([]), logprobs_of=made_up(448, EOS))
    with run_server(
        tokenizer_folder, other=engine, tool_call_parser="hermes", enable_auto_tool_choice=True
    ) as server:
        server.engine = engine
        yield server


@pytest.fixture
def beams(served: Server) -> Server:
    served.engine.submitted.clear()
    served.engine.script = lambda number: Script([])
    return served


def wanted(beams: Server, **settings: Any) -> list[dict[str, Any]]:
    """Text and end of each choice."""
    settings = {"width": 3, "n": 3, "max_tokens": 5, "ends": EOS, **settings}
    assert isinstance(beams.engine, LikelyEngine)
    found = plain_beam_search(beams.engine.logprobs_of, **settings)
    return [
        {
            "text": beams.tokenizer.decode(ids[: len(ids) - is_end], skip_special_tokens=True),
            "finish_reason": "stop" if is_end else "length",
        }
        for _, ids, is_end in found
    ]


def shown(answer: dict[str, Any]) -> list[dict[str, Any]]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [
        {
            "text": choice["text"] if "text" in choice else choice["message"]["content"],
            "finish_reason": choice["finish_reason"],
        }
        for choice in answer["choices"]
    ]


@pytest.mark.parametrize("length_penalty", [-10, 0.5, 10])
def test_a_completion_is_what_the_search_finds(beams: Server, length_penalty: float) -> None:
    answer = beams.post(COMPLETIONS, {**BEAM, "length_penalty": length_penalty})
    assert shown(answer) == wanted(beams, prompt=PROMPT, length_penalty=length_penalty)
    assert answer["usage"]["prompt_tokens"] == 3


def test_settings_of_its_end(beams: Server) -> None:
    answer = beams.post(COMPLETIONS, {**BEAM, "ignore_eos": True})
    assert shown(answer) == wanted(beams, prompt=PROMPT, ends=())
    answer = beams.post(COMPLETIONS, {**BEAM, "min_tokens": 2, "stop_token_ids": [7]})
    assert shown(answer) == wanted(beams, prompt=PROMPT, ends=(*EOS, 7), min_tokens=2)


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("min_tokens", [0, 2])
@pytest.mark.parametrize("stop", [["e"], ["o", "an", "th", "ri", "x"]])
def test_stop_strings_end_beams(
    beams: Server, stop: list[str], min_tokens: int, is_kept: bool
) -> None:
    decode = partial(beams.tokenizer.decode, skip_special_tokens=True)

    def end_of(token_ids: list[int]) -> tuple[int, str] | None:
        """Where the first stop string ends, and which it is."""
        text, start = decode(token_ids), len(decode(token_ids[:min_tokens]))
        ends = [(text.find(s, start) + len(s), s) for s in stop if s in text[start:]]
        return min(ends, default=None)

    fields = {"stop": stop, "min_tokens": min_tokens, "include_stop_str_in_output": is_kept}
    settings: Any = {"width": 8, "n": 8, "max_tokens": 6, "ends": EOS, "min_tokens": min_tokens}
    body = {**BEAM, **fields, "n": 8, "max_tokens": 6}
    answer = beams.post(COMPLETIONS, body)
    assert isinstance(beams.engine, LikelyEngine)
    found = plain_beam_search(
        beams.engine.logprobs_of, PROMPT, **settings,
        is_cut=lambda token_ids: end_of(token_ids) is not None,
    )  # fmt: skip
    reasons = set()
    for choice, (_, ids, is_end) in zip(answer["choices"], found, strict=True):
        text, cut = decode(ids[:-1] if ids[-1] in EOS else ids), end_of(ids)
        if cut is not None:
            text = text[: cut[0] - (0 if is_kept else len(cut[1]))]
        assert choice["text"] == text
        assert choice["finish_reason"] == ("stop" if is_end else "length")
        other = 0 if ids[-1] == 0 else None  # of the two stop tokens one is the model's main one
        assert choice["stop_reason"] == (cut[1] if cut is not None else other)
        reasons.add(choice["stop_reason"])
    assert len(reasons) > 1  # some end by a stop string, and others do not
    assert answer["usage"]["completion_tokens"] == sum(len(ids) for _, ids, _ in found)


def test_best_of_is_the_width(beams: Server) -> None:
    answer = beams.post(COMPLETIONS, {**BEAM, "n": 2, "best_of": 10})
    assert shown(answer) == wanted(beams, prompt=PROMPT, width=10, n=2)


def test_several_prompts_and_an_echo(beams: Server) -> None:
    prompts = [PROMPT, [70, 71]]
    answer = beams.post(COMPLETIONS, {**BEAM, "prompt": prompts, "echo": True})
    expected = []
    for prompt in prompts:
        echo = beams.tokenizer.decode(prompt, skip_special_tokens=True)
        expected += [{**one, "text": echo + one["text"]} for one in wanted(beams, prompt=prompt)]
    assert shown(answer) == expected
    beams.engine.submitted.clear()
    answer = beams.post(COMPLETIONS, {**BEAM, "echo": True, "max_tokens": 0})
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 3
    assert beams.engine.submitted == []


def test_a_chat(beams: Server) -> None:
    body = {"messages": MESSAGES, "use_beam_search": True, "n": 4, "max_tokens": 6}
    answer = beams.post(CHAT, body)
    prompt = beams.engine.submitted[0].prompt
    assert shown(answer) == wanted(beams, prompt=prompt, width=4, n=4, max_tokens=6)


def test_what_only_sampling_needs_has_no_effect(beams: Server) -> None:
    fields = {"temperature": 0, "top_p": 0.5, "top_k": 3, "min_p": 0.1, "seed": 5}
    status, headers, data = beams.request("POST", COMPLETIONS, {**BEAM, **fields})
    assert status == 200
    assert shown(json.loads(data)) == wanted(beams, prompt=PROMPT)
    assert sorted(headers["x-pyserve-ignored"].split(", ")) == sorted(fields)
    status, headers, _ = beams.request("POST", COMPLETIONS, BEAM)
    assert status == 200 and "x-pyserve-ignored" not in headers


def test_a_length_penalty_without_a_search_is_named(server: Server) -> None:
    for fields, is_named in (({"length_penalty": 2}, True), ({"length_penalty": 1}, False)):
        body = {"prompt": "Hi", "max_tokens": 1, "use_beam_search": False, **fields}
        status, headers, _ = server.request("POST", COMPLETIONS, body)
        assert status == 200
        assert ("length_penalty" in headers.get("x-pyserve-ignored", "")) == is_named


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"stream": True}, "stream"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"allowed_token_ids": [5]}, "allowed_token_ids"),
    ({"bad_words": ["a"]}, "bad_words"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
    ({"guided_choice": ["a", "b"]}, "guided_choice"),
    ({"guided_regex": "a"}, "guided_regex"),
    ({"guided_json": {}}, "guided_json"),
    ({"guided_grammar": 'start: "a"'}, "guided_grammar"),
    ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
]


@pytest.mark.parametrize(("fields", "name"), REFUSED, ids=lambda value: str(value)[:30])
def test_what_cannot_be_combined_is_named(beams: Server, fields: dict[str, Any], name: str) -> None:
    bodies = [(CHAT, {"messages": MESSAGES, "use_beam_search": True, "max_tokens": 2, **fields})]
    if name != "tool_choice":
        bodies.append((COMPLETIONS, {**BEAM, **fields}))
    for path, body in bodies:
        error = beams.error(path, body)
        assert error["message"] == f"{name} cannot be combined with use_beam_search"
        assert error["param"] == name
    assert beams.engine.submitted == []


def test_all_that_constrains_is_tried() -> None:
    tried = {name for _, name in REFUSED} | {"thinking_token_budget", "tools"}  # need a parser
    assert tried >= set(CONSTRAINING)


def test_neutral_values_and_tools_that_are_not_forced_may_stand_beside(beams: Server) -> None:
    fields = {
        "stream": False, "stop": [], "repetition_penalty": 1, "presence_penalty": 0,
        "frequency_penalty": 0, "logit_bias": {}, "bad_words": [],
        "response_format": {"type": "text"},
    }  # fmt: skip
    assert shown(beams.post(COMPLETIONS, {**BEAM, **fields})) == wanted(beams, prompt=PROMPT)
    body = ChatRequest(messages=[], use_beam_search=True, tools=[Tool(type="function")])
    beam = read_beam(body, width=3, make_constraint=unconstrained, ignored=[])
    assert beam == BeamSearch(3, 1.0)


def test_it_tells_of_its_tokens_as_other_answers_do(beams: Server) -> None:
    fields = {"logprobs": 2, "return_token_ids": True, "prompt_logprobs": 0}
    assert isinstance(beams.engine, LikelyEngine)
    answer = beams.post(COMPLETIONS, {**BEAM, "ignore_eos": True, **fields})
    assert shown(answer) == wanted(beams, prompt=PROMPT, ends=())
    for choice in answer["choices"]:
        token_ids, told = choice["token_ids"], choice["logprobs"]
        rows = [beams.engine.logprobs_of(PROMPT + token_ids[:i]) for i in range(5)]
        own = [float(row[token_id]) for row, token_id in zip(rows, token_ids, strict=True)]
        assert told["token_logprobs"] == pytest.approx(own)
        best = [max(top.values()) for top in told["top_logprobs"]]
        assert best == pytest.approx([float(row.max()) for row in rows])
        assert len(choice["prompt_logprobs"]) == 3
    asked = [item.params.num_prompt_logprobs for item in beams.engine.submitted]
    assert asked == [0] + [None] * 12  # the first round tells of the prompt
    body = {"messages": MESSAGES, "use_beam_search": True, "max_tokens": 4}
    answer = beams.post(CHAT, {**body, "logprobs": True, "top_logprobs": 3})  # 2 would do for it
    for choice in answer["choices"]:
        content = choice["logprobs"]["content"]
        assert len(content) > 0
        assert {len(one["top_logprobs"]) for one in content} == {3}


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        ({"n": 11}, "n", "n must be in [1, 10] with use_beam_search, got 11"),
        ({"best_of": 11}, "best_of", "best_of must be in [1, 10] with use_beam_search, got 11"),
        ({"n": 0}, "n", "n must be in [1, 128], got 0"),
        ({"best_of": 2}, "best_of", "best_of must be in [3, 128], and at least n, got 2"),
        ({"length_penalty": 10.5}, "length_penalty",
         "length_penalty must be in [-10, 10], got 10.5"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be at least 1, got 0"),
        ({"min_tokens": 6}, "min_tokens", "min_tokens must be at most 5"),
        ({"temperature": 3}, "temperature", "temperature must be in [0, 2], got 3"),
        ({"use_beam_search": "yes"}, "use_beam_search", "use_beam_search"),
        ({"length_penalty": "long"}, "length_penalty", "length_penalty"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_bad_values(beams: Server, fields: dict[str, Any], name: str, words: str) -> None:
    error = beams.error(COMPLETIONS, {**BEAM, **fields})
    assert words in error["message"] and error["param"] == name
    assert beams.engine.submitted == []


def test_too_much_work_is_refused(beams: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 * 100 * (3 + 100) for each prompt."""
    body = {**BEAM, "prompt": [PROMPT, PROMPT], "n": 1, "best_of": 10, "max_tokens": 100}
    monkeypatch.setattr("pyserve.api.endpoints.beam.MAX_BEAM_TOKENS", 205_999)
    error = beams.error(COMPLETIONS, body)
    assert error["param"] == "max_tokens"
    assert error["message"] == (
        "a beam search of width 10 for 100 tokens would read 206000 tokens of prompts and beams, "
        "the limit is 205999: give a smaller max_tokens"
    )
    error = beams.error(
        CHAT, {"messages": MESSAGES, "use_beam_search": True, "n": 10, "max_completion_tokens": 200}
    )
    assert error["param"] == "max_completion_tokens"


def test_a_client_that_leaves_takes_its_beams_along(beams: Server) -> None:
    beams.engine.script = lambda number: Script([], delay_s=0.01 if number < 7 else 60)
    sock: socket.socket = beams.connect(COMPLETIONS, {**BEAM, "max_tokens": 100})
    wait_until(lambda: len(beams.engine.submitted) == 10)
    assert len(beams.engine.running()) == 3
    sock.close()
    wait_until(lambda: not beams.engine.running())
    assert sum(item.is_aborted for item in beams.engine.submitted) == 3


class Rated(FakeEngine):
    """Sequences of two tokens each, told to be as likely as `ratings` has it, one after another."""

    ratings = (-3.0, -1.0, -2.0, -0.5)

    async def _play(self, item: Submitted, script: Script) -> None:
        stream: SequenceStream = item.stream
        stream.admit(0)
        if item.params.num_prompt_logprobs is not None:
            stream.prompt_logprobs += [TokenLogprobs(-1.0, 1, [], [])] * (len(item.prompt) - 1)
        rating = self.ratings[item.params.sample_index]
        logprobs = None
        if item.params.num_logprobs is not None:
            logprobs = [TokenLogprobs(rating, 1, [], [])] * 2
        stream.put([70 + item.params.sample_index] * 2, logprobs)
        stream.finish("length")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_the_most_likely_of_best_of_are_shown(tokenizer_folder: Path, path: str) -> None:
    with run_server(tokenizer_folder, other=Rated(lambda number: Script([]))) as server:
        asked = {"prompt": [PROMPT, [70]]} if path == COMPLETIONS else {"messages": MESSAGES}
        answer = server.post(path, {**asked, "n": 2, "best_of": 4, "max_tokens": 2})
        texts = [server.tokenizer.decode([70 + i] * 2, skip_special_tokens=True) for i in (3, 1)]
        num_prompts = 2 if path == COMPLETIONS else 1
        assert [one["text"] for one in shown(answer)] == texts * num_prompts
        assert answer["usage"]["completion_tokens"] == 8 * num_prompts  # what was generated
        answer = server.post(path, {**asked, "n": 2, "best_of": 2, "max_tokens": 2})
        assert len(shown(answer)) == 2 * num_prompts
        assert answer["usage"]["completion_tokens"] == 4 * num_prompts
        told = {"return_token_ids": True}
        if path == COMPLETIONS:
            told["prompt_logprobs"] = 0  # type: ignore[assignment]
        answer = server.post(path, {**asked, **told, "n": 1, "best_of": 4, "max_tokens": 2})
        ids = [choice["token_ids"] for choice in answer["choices"]]
        assert ids == [[73, 73]] * num_prompts  # whatever else is asked of tokens
        assert all(choice["logprobs"] is None for choice in answer["choices"])
        error = server.error(path, {**asked, "n": 2, "best_of": 3, "stream": True})
        assert error["param"] == "best_of"


def test_how_likely_is_a_mean_over_what_was_counted(tokenizer_folder: Path) -> None:
    """A long answer is not less likely for its length, nor for what comes behind a stop string."""

    class Long(FakeEngine):
        async def _play(self, item: Submitted, script: Script) -> None:
            item.stream.admit(0)
            words = [["a", "b", "c", "d"], ["e"], ["a", "X", "z", "z"]][item.params.sample_index]
            rates = [[-0.6] * 4, [-1.0], [-0.5, -0.5, -50.0, -50.0]][item.params.sample_index]
            ids = [server.tokenizer.encode(word, add_special_tokens=False)[0] for word in words]
            item.stream.put(ids, [TokenLogprobs(rate, 1, [], []) for rate in rates])
            item.stream.finish("length")

    with run_server(tokenizer_folder, other=Long(lambda number: Script([]))) as server:
        body = {"prompt": PROMPT, "n": 3, "best_of": 3, "stop": "X"}
        assert [one["text"] for one in shown(server.post(COMPLETIONS, body))] == ["abcd", "e", "a"]
        answer = server.post(COMPLETIONS, {**body, "n": 2})
        assert [one["text"] for one in shown(answer)] == ["a", "abcd"]
