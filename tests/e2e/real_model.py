"""A real small model through the whole server, against transformers; run on demand:

    python -m pytest tests/e2e/real_model.py -m network -s

SmolLM2-135M-Instruct from the package index (bench/smollm2.py), in float32 on the CPU: 16 greedy
answers. The prompt's ids, the text, whole and streamed, and each id of the answer must be those of
transformers on the same folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import smollm2
from tests.e2e.conftest import Server, start_server

pytestmark = [pytest.mark.network, pytest.mark.timeout(1800)]

MAX_TOKENS = 48
MIN_GAP = 1e-3  # of the best two logits, where no rounding decides
SYSTEM = {"role": "system", "content": "Answer in one line."}
QUESTIONS = [
    "What is the capital of France?",
    "Write a Python function that adds two numbers.",
    "Name three colours.",
    "¿Cuál es la capital de España?",
    "Was ist größer, die Sonne oder der Mond?",
    "用中文说你好。",
    "Count from 1 to 20.",
    "What is 12345 + 678?",
    "Write a haiku about rain.",
    "List the days of the week as JSON.",
    "Explain gravity to a child.",
    "Translate 'good morning' into French.",
    "Give me a recipe with eggs 🥚 and cheese 🧀.",
    "    indented\n\tquestion: what is a tab?",
    "Repeat: <|im_end|> <|im_start|>user",
    "Who wrote Hamlet, and when?",
]
MESSAGES = [[SYSTEM, {"role": "user", "content": question}] if index % 4 == 3
            else [{"role": "user", "content": question}]
            for index, question in enumerate(QUESTIONS)]  # fmt: skip


class Answer:
    """What transformers says: ids of the prompt and of the answer, its text, the closest call."""

    def __init__(self, model: Any, tokenizer: Any, messages: list[dict[str, str]]) -> None:
        rendered = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        self.text_of_prompt: str = rendered
        self.prompt: list[int] = tokenizer.encode(rendered, add_special_tokens=False)
        ids = torch.tensor([self.prompt])
        result = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        self.ids: list[int] = result.sequences[0, len(self.prompt) :].tolist()
        self.text: str = tokenizer.decode(self.ids, skip_special_tokens=True)
        best = torch.cat(result.logits).topk(2).values
        self.gap = float((best[:, 0] - best[:, 1]).min())
        self.ended = self.ids[-1] == tokenizer.eos_token_id


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2")
    smollm2.make(path)
    return path


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[Answer]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [Answer(model, tokenizer, messages) for messages in MESSAGES]


@pytest.fixture(scope="module")
def server(folder: Path, answers: list[Answer]) -> Iterator[Server]:
    """After the oracle, so that the two do not share the machine."""
    flags = ["--model", str(folder), "--served-model-name", "smollm2", "--dtype", "float32"]
    with start_server(folder / "log", *flags, "--max-model-len", "1024") as running:
        yield running


def in_parallel(call: Any, *lists: Any) -> list[Any]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(call, *lists))


def body(messages: list[dict[str, str]], **fields: object) -> dict[str, Any]:
    return {"model": "smollm2", "messages": messages, "temperature": 0,
            "max_tokens": MAX_TOKENS} | fields  # fmt: skip


def test_prompts_have_the_same_ids(server: Server, answers: list[Answer]) -> None:
    """But for a user's "<|im_end|>": transformers takes it for the end of the message."""
    for messages, answer in zip(MESSAGES, answers, strict=True):
        fields = {"messages": messages, "add_generation_prompt": True}
        ids = server.json("/tokenize", fields)["tokens"]
        if "<|im_end|>" in messages[-1]["content"]:
            assert ids != answer.prompt
            assert ids.count(2) == answer.prompt.count(2) - 1
        else:
            assert ids == answer.prompt
        assert server.json("/detokenize", {"tokens": ids})["prompt"] == answer.text_of_prompt


def test_answers_are_the_same_whole_and_streamed(server: Server, answers: list[Answer]) -> None:
    """From the prompt as text, so that both see the same ids; all 16 at once, as they come."""
    start = time.perf_counter()

    def ask(answer: Answer) -> None:
        fields = {"model": "smollm2", "prompt": answer.text_of_prompt, "temperature": 0,
                  "max_tokens": MAX_TOKENS, "add_special_tokens": False}  # fmt: skip
        whole = server.json("/v1/completions", fields)
        (choice,) = whole["choices"]
        assert choice["text"] == answer.text
        assert choice["finish_reason"] == ("stop" if answer.ended else "length")
        assert whole["usage"]["prompt_tokens"] == len(answer.prompt)
        assert whole["usage"]["completion_tokens"] == len(answer.ids)
        with server.client() as client:
            stream = client.completions.create(
                model="smollm2", prompt=answer.text_of_prompt, temperature=0,
                max_tokens=MAX_TOKENS, stream=True, extra_body={"add_special_tokens": False},
            )  # fmt: skip
            assert "".join(chunk.choices[0].text for chunk in stream) == answer.text

    in_parallel(ask, answers)
    num_tokens = sum(len(answer.ids) for answer in answers)
    print(
        f"\n16 answers, {num_tokens} tokens, {sum(answer.ended for answer in answers)} ended by "
        f"themselves; closest two logits {min(answer.gap for answer in answers):.4f}; "
        f"{2 * num_tokens / (time.perf_counter() - start):.0f} tokens/s",
        end="",
    )
    assert min(answer.gap for answer in answers) > MIN_GAP
    assert "Paris" in answers[0].text  # both read the folder: it must also be the right model


def test_chats_are_the_same_whole_and_streamed(server: Server, answers: list[Answer]) -> None:
    def ask(messages: list[dict[str, str]], answer: Answer) -> None:
        whole = server.json("/v1/chat/completions", body(messages))
        assert whole["choices"][0]["message"]["content"] == answer.text
        with server.client() as client:
            stream = client.chat.completions.create(**body(messages, stream=True))
            parts = [chunk.choices[0].delta.content or "" for chunk in stream]
        assert "".join(parts) == answer.text

    plain = [(messages, answer) for messages, answer in zip(MESSAGES, answers, strict=True)
             if "<|im_end|>" not in messages[-1]["content"]]  # fmt: skip
    in_parallel(ask, *zip(*plain, strict=True))


def test_each_id_of_an_answer_is_the_same(server: Server, answers: list[Answer]) -> None:
    """Behind the ids before it, each is the one that comes: named as a stop, it ends the answer."""

    def ask(answer: Answer, position: int) -> None:
        fields = {"model": "smollm2", "prompt": answer.prompt + answer.ids[:position],
                  "temperature": 0, "max_tokens": 1, "ignore_eos": True,
                  "stop_token_ids": [answer.ids[position]]}  # fmt: skip
        (choice,) = server.json("/v1/completions", fields)["choices"]
        assert choice["stop_reason"] == answer.ids[position], (answer.text, position)

    places = [(answer, position) for answer in answers for position in range(len(answer.ids))]
    in_parallel(ask, *zip(*places, strict=True))
    print(f" {len(places)} ids", end="")
