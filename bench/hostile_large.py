"""Large requests, most of them legal: what a client may ask, and the others must not feel.

Each takes as much as the bounds of the server allow of one thing: text for the threads that
tokenise, ids, sequences, characters to show again, stop strings. Some are hung up on, as they have
no end.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

MAX_CHARS = MAX_IDS = 2**20
NUM_SEQUENCES = 640  # of one request, at default flags
NUM_IDS = 200  # ids below are in every vocabulary


def large_request(rng: random.Random) -> tuple[str, bytes, str, bool]:
    """Path, body, name, and whether it runs on until it is hung up on."""
    name = rng.choice(list(MAKERS))
    scale = rng.choice([0.01, 0.1, 0.5, 1.0])
    path, fields, is_endless = MAKERS[name](rng, scale)
    return path, json.dumps(fields).encode(), f"{name}, {scale:g} of the most", is_endless


Large = tuple[str, dict[str, Any], bool]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def _say(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 2, **fields}


def _text(rng: random.Random, num_chars: int) -> str:
    unit = rng.choice(["x", " ", "word ", "漢", "\U0001f9ff", ".\n", "<|im_end|>", "<|im_"])
    return (unit * (num_chars // len(unit) + 1))[:num_chars]


def _tokenize(rng: random.Random, scale: float) -> Large:
    text = _text(rng, int(MAX_CHARS * scale))
    return "/tokenize", {"prompt": text, "return_token_strs": rng.random() < 0.8}, False


def _tokenize_chat(rng: random.Random, scale: float) -> Large:
    fields = _say(_text(rng, int(MAX_CHARS * scale)), truncate_prompt_tokens=rng.choice([None, 4]))
    return rng.choice(["/tokenize", CHAT]), fields, False


def _detokenize(rng: random.Random, scale: float) -> Large:
    ids = [i % NUM_IDS for i in range(int(MAX_IDS * scale))]
    tokens = list(map(float, ids)) if rng.random() < 0.2 else ids
    return "/detokenize", {"tokens": tokens}, False


def _ids(rng: random.Random, scale: float) -> Large:
    num_prompts = int(NUM_SEQUENCES * scale) + 1
    length = MAX_IDS // NUM_SEQUENCES
    prompts = [[i % NUM_IDS] * length for i in range(num_prompts)]
    return COMPLETIONS, {"prompt": prompts, "max_tokens": 1}, True


def _special(rng: random.Random, scale: float) -> Large:
    prompt = [rng.randrange(3)] * int(4000 * scale)
    return COMPLETIONS, {"prompt": prompt, "n": 128, "max_tokens": 1}, True


def _sequences(rng: random.Random, scale: float) -> Large:
    """A few bytes that take as many places of the queue as one request gets."""
    n = rng.choice([64, 128])
    fields: dict[str, Any] = {"prompt": ["x"] * int(NUM_SEQUENCES * scale / n + 1), "n": n}
    fields |= {"max_tokens": 2000, "ignore_eos": True, "stream": rng.random() < 0.5}
    return COMPLETIONS, fields, True


def _echo(rng: random.Random, scale: float) -> Large:
    prompt = "the quick brown fox " * int(350 * scale + 1)
    fields = {"prompt": [prompt] * 4, "n": 128, "echo": True, "max_tokens": 0}
    return COMPLETIONS, {**fields, "stream": rng.random() < 0.5}, False


def _stop(rng: random.Random, scale: float) -> Large:
    length = int(128 * scale) + 1
    stop = [chr(0x100 + i) * length for i in range(64)]
    bias = {str(i): 1.0 for i in range(int(300 * scale))}
    return CHAT, _say("x", n=64, stop=stop, logit_bias=bias), True


def _logprobs(rng: random.Random, scale: float) -> Large:
    n = int(127 * scale) + 1
    fields = {"logprobs": 20, "max_tokens": 1000, "ignore_eos": True, "temperature": 1}
    return COMPLETIONS, {"prompt": "x", "n": n, "stream": rng.random() < 0.5, **fields}, True


def _prompt_logprobs(rng: random.Random, scale: float) -> Large:
    prompt = [i % NUM_IDS for i in range(int(4000 * scale) + 1)]
    fields: dict[str, Any] = {"prompt": [prompt] * rng.choice([1, 8]), "max_tokens": 1}
    if rng.random() < 0.5:
        return COMPLETIONS, {**fields, "prompt_logprobs": 20}, True
    return COMPLETIONS, {**fields, "logprobs": 20, "echo": True}, True


def _beams(rng: random.Random, scale: float) -> Large:
    width = int(63 * scale) + 1
    fields = {"use_beam_search": True, "best_of": width, "n": width, "temperature": 0}
    return COMPLETIONS, {"prompt": "x", "max_tokens": 1000, "ignore_eos": True, **fields}, True


def _values(rng: random.Random, scale: float) -> Large:
    name = rng.choice(["documents", "chat_template_kwargs", "metadata"])
    unit: Any = rng.choice([1, "x", [], {}, {"a": 1}, 1e308])
    values = [unit] * int(2**15 * scale)
    return CHAT, _say("x", **{name: values if name == "documents" else {"a": values}}), False


MAKERS: dict[str, Callable[[random.Random, float], Large]] = {
    "text to tokenise": _tokenize,
    "a chat of text": _tokenize_chat,
    "ids to text": _detokenize,
    "prompts of ids": _ids,
    "special tokens": _special,
    "sequences": _sequences,
    "echo": _echo,
    "stop strings": _stop,
    "values": _values,
    "log probabilities": _logprobs,
    "log probabilities of a prompt": _prompt_logprobs,
    "beams": _beams,
}
