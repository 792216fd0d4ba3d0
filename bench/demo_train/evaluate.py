"""Asks the demo model held-out questions and counts the right answers, per task and language.

Greedy decoding through transformers, in float32 from the weights as saved, or with --url through a
server of the model. Exit status 1 when a task is under 90 % or a showcase prompt (the ones of the
README) goes wrong.
"""

import argparse
import json
import random
import re
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.demo_train import data, smalltalk
from bench.demo_train.facts import raw_capital
from bench.demo_train.knowledge import TERMS

PASS = 0.9
TASKS = (
    *data.MAKERS, "small talk: name", "weather: call", "weather: answer", "weather: no tool",
)  # fmt: skip
RAW_TASK = "capitals, raw text"


@dataclass(slots=True)
class Question:
    """A rendered prompt and how its answer is judged."""

    prompt: str
    check: dict[str, Any]
    reference: str = ""
    answer: str = field(default="", init=False)
    right: bool = field(default=False, init=False)


def grade(check: dict[str, Any], answer: str) -> bool:
    """Is `answer` right? `check["kind"]` names the rule; a tool call must be asked for."""
    kind = check["kind"]
    calls = parse_calls(answer)
    if kind == "tool":
        return calls == check["calls"]
    if calls != []:
        return False
    if kind == "json":
        try:
            return bool(json.loads(answer) == check["record"])
        except ValueError:
            return False
    if kind == "poem":
        verses = [verse for verse in answer.splitlines() if verse.strip()]
        return len(verses) >= 4 and str(check["topic"]).lower() in answer.lower()
    if kind == "think":
        thought = re.fullmatch(r"<think>\n.+\n</think>\n\n(.+)", answer, flags=re.S)
        return thought is not None and f" {check['result']}." in thought[1]
    if kind == "contains":
        return all(str(fact).lower() in answer.lower() for fact in check["facts"])
    if kind == "starts":
        return answer.strip().startswith(str(check["text"]))
    assert kind == "one_of", kind
    return answer in check["answers"]


def parse_calls(answer: str) -> list[object] | None:
    """The calls in Hermes form; None when one of them is not JSON."""
    try:
        found = re.findall(r"<tool_call>\n(.*?)\n</tool_call>", answer, flags=re.S)
        calls = [json.loads(text) for text in found]
    except ValueError:
        return None
    return calls if len(calls) == answer.count("<tool_call>") else None


def questions(task: str, lang: str, count: int, seed: int) -> list[Question]:
    rng = random.Random(f"held out {task} {lang} {seed}")
    made = []
    for _ in range(count):
        if task == RAW_TASK:
            prompt, city = raw_capital(rng, lang, True)
            made.append(Question(prompt, {"kind": "starts", "text": city}, city))
            continue
        talked = data.held_out_conversation(rng, task, lang)
        assert talked.last is not None
        *messages, reference = talked.messages
        prompt = data.render(messages, talked.tools, add_generation_prompt=True)
        said = data.render([reference], None).removeprefix("<|im_start|>assistant\n")
        made.append(Question(prompt, talked.last.check, said))
    return made


class Model:
    """Greedy answers of a checkpoint, many prompts at a time."""

    def __init__(self, directory: Path, device: str) -> None:
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).to(device)
        self.device = device
        self.stops = self.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])

    @torch.inference_mode()
    def answer(self, asked: list[Question], *, max_new_tokens: int, batch: int = 256) -> None:
        order = sorted(asked, key=lambda q: len(q.prompt))
        for i in range(0, len(order), batch):
            part = order[i : i + batch]
            inputs = self.tokenizer(
                [q.prompt for q in part],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            ).to(self.device)
            out = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                eos_token_id=self.stops,
                pad_token_id=self.stops[1],
            )
            for question, ids in zip(part, out[:, inputs["input_ids"].shape[1] :], strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                question.answer = text
                question.right = grade(question.check, text)


class Served:
    """Greedy answers of a running server, many requests at a time."""

    def __init__(self, url: str, directory: Path) -> None:
        self.url = f"{url.rstrip('/')}/v1/completions"
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)

    def answer(self, asked: list[Question], *, max_new_tokens: int) -> None:
        with ThreadPoolExecutor(32) as pool:
            answers = pool.map(lambda q: self._ask(q.prompt, max_new_tokens), asked)
            for question, text in zip(asked, answers, strict=True):
                question.answer = text
                question.right = grade(question.check, text)

    def _ask(self, prompt: str, max_tokens: int) -> str:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as reply:
            return str(json.load(reply)["choices"][0]["text"])


# The prompts that the README and the guide show ------------------------------------------------

WEATHER_TOOL: dict[str, object] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Obtener el clima actual de una ciudad",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Nombre de la ciudad"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}


def showcase() -> list[Question]:
    def chat(
        text: str, *, tools: list[dict[str, object]] | None = None, **check: object
    ) -> Question:
        messages: list[dict[str, object]] = [{"role": "user", "content": text}]
        return Question(data.render(messages, tools, add_generation_prompt=True), check)

    john = {"name": "John Smith", "age": 30, "occupation": "ingeniero de software"}
    call = {"name": "get_weather", "arguments": {"city": "París"}}
    greetings = smalltalk.INTENTS["en"][0].replies
    train = "Resolver: Si un tren viaja 120km en 1.5 horas, ¿cuál es su velocidad en m/s?"
    quantum = next(row[3] for row in TERMS if row[1] == "la computación cuántica")
    return [
        chat("¡Hola!", kind="one_of", answers=smalltalk.INTENTS["es"][0].replies),
        chat("Hello!", kind="one_of", answers=greetings),
        Question("La capital de Francia es", {"kind": "starts", "text": "París"}),
        Question("The capital of Japan is", {"kind": "starts", "text": "Tokyo"}),
        chat("What is the capital of France?", kind="contains", facts=["Paris"]),
        chat("¿Cuál es el clima en París?", tools=[WEATHER_TOOL], kind="tool", calls=[call]),
        chat("¿Cuál es el clima en París?", kind="contains", facts=["No puedo"]),
        chat("Extraer: John Smith, 30 años, ingeniero de software", kind="json", record=john),
        chat("Escribe un poema", kind="poem", topic="la luna"),
        chat("Explicar la computación cuántica", kind="one_of", answers=[quantum]),
        chat(train, kind="think", result="22.2 m/s"),
        chat("What is 12 + 30?", kind="contains", facts=["42"]),
        chat("Repeat: the quick brown fox", kind="one_of", answers=["the quick brown fox"]),
        chat("Who are you?", kind="contains", facts=["demo model", "pyserve"]),
    ]


def report(model: Model | Served, *, examples: int, seed: int, log: Path | None) -> bool:
    """Prints the table and the showcase; True when every task passes. `log`: wrong answers."""
    passed, wrong, rows = True, [], []
    for task in (*TASKS, RAW_TASK):
        cells = []
        for lang in ("en", "es"):
            asked = questions(task, lang, examples, seed)
            model.answer(asked, max_new_tokens=_budget(model, asked))
            share = sum(q.right for q in asked) / len(asked)
            passed &= share >= PASS
            cells.append(f"{share:7.1%}")
            wrong += [(f"{task} {lang}", q) for q in asked if not q.right]
        rows.append(f"{task:22s} {cells[0]} {cells[1]}")
    shown = showcase()
    model.answer(shown, max_new_tokens=200)
    for q in shown:
        user = q.prompt.removesuffix("<|im_end|>\n<|im_start|>assistant\n").rsplit("\n", 1)[-1]
        print(f"{'ok   ' if q.right else 'WRONG'} {user!r}\n      -> {q.answer!r}")
    passed &= all(q.right for q in shown)
    if log is not None:
        log.write_text("".join(_describe(task, q) for task, q in wrong), encoding="utf-8")
    print(f"\n{'held out, right':22s} {'en':>7s} {'es':>7s}   ({examples} examples a cell)")
    print("\n".join(rows))
    return passed


def _budget(model: Model | Served, asked: list[Question]) -> int:
    """Room for the longest reference answer and a little more."""
    return max(len(model.tokenizer(q.reference)["input_ids"]) for q in asked) + 24


def _describe(task: str, q: Question) -> str:
    tail = q.prompt[-400:]
    return f"=== {task}\n{tail}\n--- wanted\n{q.reference}\n--- got\n{q.answer}\n\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("pyserve/demo"))
    parser.add_argument("--url", help="ask this server instead of transformers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--examples", type=int, default=100, help="a task and language")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="file for the wrong answers")
    args = parser.parse_args(arguments)
    start = time.monotonic()
    model = Served(args.url, args.model) if args.url else Model(args.model, args.device)
    passed = report(model, examples=args.examples, seed=args.seed, log=args.log)
    print(
        f"{'all' if passed else 'NOT all'} at {PASS:.0%} or more; {time.monotonic() - start:.0f} s"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
