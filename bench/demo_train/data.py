"""Mixes exchanges into conversations and raw documents, and turns them into token arrays.

A seed gives the same documents everywhere. Only what the assistant says is learned (loss mask);
documents are grouped by padded length, so that no attention mask is needed: padding follows the
text, and causal attention never looks ahead.
"""

import json
import multiprocessing
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import jinja2
import numpy as np
import tokenizers

from bench.demo_train import facts, fallback, skills, smalltalk, speed, weather
from bench.demo_train.phrasing import Exchange, Split, phrases
from bench.demo_train.slots import first_name, made_up_phrase

TEMPLATE_PATH = Path(__file__).parents[2] / "pyserve" / "demo" / "chat_template.jinja"
LENGTHS = (48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
MAX_LENGTH = LENGTHS[-1]
_CHUNK = 2000

Maker = Callable[[random.Random, str, bool], Exchange]
MAKERS: dict[str, Maker] = {
    "small talk": smalltalk.small_talk,
    "capitals": facts.capital,
    "arithmetic": skills.arithmetic,
    "poem": facts.poem,
    "explaining": facts.explain,
    "extraction": skills.extract,
    "reasoning": speed.speed_problem,
    "copying": skills.copy,
    "counting": skills.count,
    "fallback": fallback.fallback,
}
_SHARES = {
    "small talk": 9,
    "capitals": 8,
    "arithmetic": 16,
    "poem": 5,
    "explaining": 8,
    "extraction": 11,
    "reasoning": 15,
    "copying": 14,
    "counting": 2,
    "fallback": 6,
}
_SYSTEM = Split(
    phrases("""
    You are (a/an expert/the/a very good) (bot/assistant/model/guide). | Eres (un/el) (bot/modelo/
    guía/experto). | You are a helpful assistant. | You are a friendly assistant. | You are a
    helpful assistant that answers briefly. | Answer in the language of the question. | Be brief
    and polite. | You are the assistant of a small shop. | You are pyserve's demo model. | Always
    be kind. | Eres un asistente útil. | Eres un asistente amable. | Responde en español. |
    Responde con brevedad. | Sé breve y amable. | Eres el modelo de demostración de pyserve. |
    Contesta en el idioma de la pregunta. | You answer questions. | Today is Monday. | Hoy es
    martes. | The user is called a customer. | You are an AI assistant. Answer the user's
    questions as well as you can.
    """),
    phrases("You are a very helpful assistant. | Eres un asistente muy útil. | Be helpful."),
)


@dataclass(slots=True)
class Conversation:
    """`learned[i]` says whether the i-th assistant message counts in the loss."""

    messages: list[dict[str, object]] = field(default_factory=list)
    tools: list[dict[str, object]] | None = None
    learned: list[bool] = field(default_factory=list)
    last: Exchange | None = None


class _Writer:
    """Writes one conversation exchange by exchange; knows the tools and the user's name."""

    def __init__(self, rng: random.Random, lang: str, *, held: bool) -> None:
        self.rng, self.lang = rng, lang
        self.conversation = Conversation()
        self.tool: weather.WeatherTool | None = None
        self.name: str | None = None
        self.talked_weather = False
        if rng.random() < 0.25:
            content = _SYSTEM.pick(rng, held)
            if rng.random() < 0.4:  # any instructions, which it has not learned to follow
                more = (made_up_phrase(rng, held) for _ in range(rng.randint(1, 12)))
                content = " ".join((content, *more))
            self.conversation.messages.append({"role": "system", "content": content})

    def give_tools(self, held: bool, *, weather_too: bool = True) -> None:
        tools, self.tool = weather.tool_set(self.rng, held, weather=weather_too)
        self.conversation.tools = tools

    def add(self, task: str, held: bool) -> None:
        rng, lang = self.rng, self.lang
        if task == "weather":
            follow_up = self.talked_weather and rng.random() < 0.5
            exchange = weather.weather(rng, lang, held, tool=self.tool, follow_up=follow_up)
            self.talked_weather = self.tool is not None
        elif task == "introduce":
            self.name = first_name(rng, held)
            exchange = smalltalk.introduce(rng, lang, held, name=self.name)
        elif task == "recall":
            exchange = smalltalk.recall(rng, lang, held, name=self.name)
        else:
            exchange = MAKERS[task](rng, lang, held)
        self.append(exchange)

    def append(self, exchange: Exchange) -> None:
        conversation = self.conversation
        if conversation.last is not None and conversation.last.task == "reasoning":
            self._forget_reasoning()
        conversation.messages += exchange.messages
        conversation.learned += [True] * sum(m["role"] == "assistant" for m in exchange.messages)
        conversation.last = exchange

    def _forget_reasoning(self) -> None:
        """A server hands the reasoning over apart, so histories come back without it."""
        if self.rng.random() < 0.5:
            message = self.conversation.messages[-1]
            content = re.sub(r"<think>.*</think>\n\n", "", str(message["content"]), flags=re.S)
            self.conversation.messages[-1] = message | {"content": content}
            self.conversation.learned[-1] = False


def conversation(rng: random.Random, emphasis: Sequence[str] = ()) -> Conversation:
    """A conversation for training, of one exchange or of several.

    With `emphasis`, half of them are one exchange of one of these tasks (to go on training with).
    """
    writer = _Writer(rng, rng.choice(("en", "es")), held=False)
    if emphasis and rng.random() < 0.5:
        writer.add(rng.choice(emphasis), False)
        return writer.conversation
    tools = rng.random()
    if tools < 0.22:
        writer.give_tools(False)
    elif tools < 0.26:
        writer.give_tools(False, weather_too=False)
    count = rng.choices((1, 2, 3, 5, 8, 16, 40), (50, 18, 12, 10, 7, 2.6, 0.4))[0]
    for _ in range(count):
        if rng.random() < 0.08:
            writer.lang = "es" if writer.lang == "en" else "en"
        writer.add(_next_task(rng, writer), False)
    return writer.conversation


def _next_task(rng: random.Random, writer: _Writer) -> str:
    if rng.random() < (0.7 if writer.tool else 0.04):
        return "weather"
    if rng.random() < (0.15 if writer.name else 0.03):
        return "recall" if writer.name or rng.random() < 0.3 else "introduce"
    return rng.choices(list(_SHARES), list(_SHARES.values()))[0]


def held_out_conversation(rng: random.Random, task: str, lang: str) -> Conversation:
    """A conversation whose last exchange is held out in phrasing and values; that one is judged.

    Tasks are those of `MAKERS` and "weather: call", "weather: answer", "weather: no tool" and
    "small talk: name". Some begin with exchanges of the training kind or have tools not needed.
    """
    writer = _Writer(rng, lang, held=True)
    is_weather = task.startswith("weather")
    if (is_weather and task != "weather: no tool") or (not is_weather and rng.random() < 0.15):
        writer.give_tools(True)
    elif task == "weather: no tool" and rng.random() < 0.3:
        writer.give_tools(True, weather_too=False)
    if task == "small talk: name":
        writer.add("introduce", True)
    for _ in range(rng.choice((0, 0, 1, 2))):
        writer.add(rng.choices(list(_SHARES), list(_SHARES.values()))[0], False)
    if is_weather:
        full = task == "weather: answer"
        writer.append(weather.weather(rng, lang, True, tool=writer.tool, full=full))
    elif task == "small talk: name":
        writer.add("recall", True)
    else:
        writer.add(task, True)
    return writer.conversation


def raw_document(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return skills.raw_sum(rng)
    return facts.raw_text(rng, rng.choice(("en", "es")))


# From text to tokens --------------------------------------------------------------------------


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=False)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))


def render(
    messages: list[dict[str, object]],
    tools: list[dict[str, object]] | None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    return _template().render(
        messages=messages, tools=tools, add_generation_prompt=add_generation_prompt
    )


def documents(
    seed: int, count: int, emphasis: Sequence[str] = ()
) -> Iterator[tuple[str, list[bool] | None]]:
    """`count` texts, each with the assistant messages that count; None: all of it counts."""
    rng = random.Random(f"documents {seed}")
    for _ in range(count):
        if rng.random() < 0.08:
            yield raw_document(rng) + "<|endoftext|>", None
        else:
            talked = conversation(rng, emphasis)
            yield render(talked.messages, talked.tools), talked.learned


def marks_of(tokenizer: tokenizers.Tokenizer) -> tuple[int, int, int]:
    """`marks` of loss_mask."""
    ids = [tokenizer.token_to_id(t) for t in ("<|im_start|>", "assistant", "<|im_end|>")]
    start, assistant, end = ids
    assert start is not None and assistant is not None and end is not None
    return start, assistant, end


def loss_mask(ids: np.ndarray, learned: list[bool], marks: tuple[int, int, int]) -> np.ndarray:
    """True from after the assistant's header up to its end mark.

    `marks`: ids of <|im_start|>, of the token `assistant`, of <|im_end|>.
    """
    start, assistant, end = marks
    mask = np.zeros(len(ids), dtype=bool)
    heads = np.flatnonzero((ids[:-1] == start) & (ids[1:] == assistant))
    ends = np.flatnonzero(ids == end)
    assert len(heads) == len(learned)
    for head, wanted in zip(heads, learned, strict=True):
        if wanted:
            mask[head + 3 : ends[np.searchsorted(ends, head)] + 1] = True
    return mask


Buckets = dict[int, list[tuple[np.ndarray, np.ndarray]]]


def _encode_chunk(job: tuple[int, int, Sequence[str], str]) -> Buckets:
    seed, count, emphasis, tokenizer_path = job
    tokenizer = tokenizers.Tokenizer.from_file(tokenizer_path)
    marks = marks_of(tokenizer)
    texts, learned = zip(*documents(seed, count, emphasis), strict=True)
    rows: Buckets = {length: [] for length in LENGTHS}
    for encoding, wanted in zip(tokenizer.encode_batch(list(texts)), learned, strict=True):
        if len(encoding.ids) > MAX_LENGTH:
            continue
        ids = np.asarray(encoding.ids, dtype=np.int16)
        mask = np.ones(len(ids), bool) if wanted is None else loss_mask(ids, wanted, marks)
        length = next(n for n in LENGTHS if n >= len(ids))
        padded = np.zeros(length, np.int16), np.zeros(length, bool)
        padded[0][: len(ids)], padded[1][: len(ids)] = ids, mask
        rows[length].append(padded)
    return {
        length: [(np.stack([r[0] for r in found]), np.stack([r[1] for r in found]))]
        for length, found in rows.items()
        if found
    }


def token_arrays(
    tokenizer_path: Path,
    seed: int,
    *,
    num_documents: int,
    emphasis: Sequence[str],
    workers: int,
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """padded length -> (ids int16 [rows, length], loss mask bool [rows, length])"""
    jobs = [
        (
            seed * 1_000_003 + start,
            min(_CHUNK, num_documents - start),
            emphasis,
            str(tokenizer_path),
        )
        for start in range(0, num_documents, _CHUNK)
    ]
    buckets: Buckets = {}
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        for chunk in pool.imap(_encode_chunk, jobs):
            for length, arrays in chunk.items():
                buckets.setdefault(length, []).extend(arrays)
    return {
        length: (np.concatenate([a[0] for a in found]), np.concatenate([a[1] for a in found]))
        for length, found in sorted(buckets.items())
    }
