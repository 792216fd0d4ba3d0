"""Templates: their split into training and held-out, their filling, how people type them.

What is held out never reaches training. A template list is a `Split`; made-up values are split by a
hash of the value, number pairs by a hash of the pair, so the two sides cannot meet.
"""

import itertools
import random
import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from bench.demo_train.knowledge import CAPITALS, TERMS

ALL_SPLITS: list["Split"] = []


@dataclass(frozen=True)
class Split:
    """A list of strings in two disjoint parts: `train` and `held_out`.

    A string may have alternatives in parentheses: "I am (/very/so) (sad/tired)" stands for six.
    """

    train: Sequence[str]
    held_out: Sequence[str]

    def __post_init__(self) -> None:
        ALL_SPLITS.append(self)

    def pick(self, rng: random.Random, held: bool) -> str:
        text = rng.choice(self.held_out if held else self.train)
        if "/" not in text:
            return text
        chosen = _ALTERNATIVES.sub(lambda found: rng.choice(found[1].split("/")), text)
        return " ".join(chosen.split())


_ALTERNATIVES = re.compile(r"\(([^()]*/[^()]*)\)")


def expand(text: str) -> list[str]:
    """Every string that a string with alternatives stands for."""
    parts = _ALTERNATIVES.split(text)
    choices = [part.split("/") if i % 2 else [part] for i, part in enumerate(parts)]
    return [" ".join("".join(chosen).split()) for chosen in itertools.product(*choices)]


@dataclass(slots=True)
class Exchange:
    """A user's message and what follows it up to the last answer.

    `messages` ends with the assistant's reference answer; `check` says how an answer is judged: a
    kind that `evaluate.grade` knows, and its arguments.
    """

    task: str
    lang: str
    messages: list[dict[str, object]]
    check: dict[str, object] = field(default_factory=dict)


def talk(task: str, lang: str, user: str, answer: str, **check: object) -> Exchange:
    """One question and one answer; without `check` the answer must be this very text."""
    messages: list[dict[str, object]] = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": answer},
    ]
    return Exchange(task, lang, messages, check or {"kind": "one_of", "answers": [answer]})


def phrases(text: str) -> list[str]:
    """What stands between bars; line breaks and runs of blanks count as one blank."""
    return [" ".join(part.split()) for part in text.split("|")]


def words(text: str) -> list[str]:
    """What stands between commas."""
    return [" ".join(part.split()) for part in text.split(",")]


def is_held_out(value: object) -> bool:
    """One value in eight is held out; the same ones on every machine."""
    return zlib.crc32(str(value).lower().encode()) % 8 == 0


# Roughening: how people type ------------------------------------------------------------------

_SLOT = re.compile(r"(\{\w+\})")
_MODES = (
    *("plain",) * 11, *("ascii",) * 3, *("lower",) * 3, *("lower ascii bare",) * 2,
    *("bare",) * 3, "upper",
)  # fmt: skip


def strip_accents(text: str) -> str:
    decomposed = unicodedata.normalize("NFD", text)
    plain = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
    return plain.replace("¿", "").replace("¡", "")


def phrase(rng: random.Random, template: str, held: bool, **slots: str) -> str:
    """Fills a template and writes it the way people type: accents, case, marks may go missing.

    Values are copied as they are, except those of slots whose name starts with `fact_`: they are
    roughened as well. Held-out text gets no typing errors: it measures understanding only.
    """
    mode = rng.choice(_MODES)
    if "bare" in mode:
        template = template.rstrip("?.! ")
    if not held and rng.random() < 0.1:
        template = _disturb(rng, template)
    parts = _SLOT.split(template)
    for i, part in enumerate(parts):
        if part.startswith("{"):
            name = part[1:-1]
            parts[i] = _rough(slots[name], mode) if name.startswith("fact_") else slots[name]
        else:
            parts[i] = _rough(part, mode)
            if not held and rng.random() < 0.02:
                parts[i] = _mistype(rng, parts[i])
    return "".join(parts) + (" " if rng.random() < 0.02 else "")


@cache
def _corpus_words() -> list[str]:
    """The words of what is known by heart, in both languages."""
    text = " ".join(" ".join(row) for row in (*TERMS, *CAPITALS))
    return sorted({word for word in re.findall(r"[^\W\d_]+", text.lower()) if len(word) > 2})


def corpus_word(rng: random.Random) -> str:
    return rng.choice(_corpus_words())


def _disturb(rng: random.Random, template: str) -> str:
    """Leaves out, adds or changes a word, so that no phrasing hangs on a single one."""
    parts = template.split(" ")
    places = [i for i, part in enumerate(parts) if part.isalpha()]
    if len(parts) < 4 or not places:
        return template
    i = rng.choice(places)
    kind = rng.random()
    if kind < 0.4:
        del parts[i]
    elif kind < 0.7:
        parts.insert(i, corpus_word(rng))
    else:
        parts[i] = corpus_word(rng)
    return " ".join(parts)


def _rough(text: str, mode: str) -> str:
    if "ascii" in mode:
        text = strip_accents(text)
    if "lower" in mode:
        text = text.lower()
    return text.upper() if mode == "upper" else text


def _mistype(rng: random.Random, text: str) -> str:
    """Drops a letter or swaps two."""
    places = [i for i in range(1, len(text) - 1) if text[i].isalpha() and text[i + 1].isalpha()]
    if not places:
        return text
    i = rng.choice(places)
    if rng.random() < 0.5:
        return text[:i] + text[i + 1 :]
    return text[:i] + text[i + 1] + text[i] + text[i + 2 :]


_PREFIX = {
    "en": Split(
        phrases("""
        Please | Please, | (Hey/Hello/Hi)(,/!) | (Ok/So/Now/Well/And/Then), | (I have a /One /A
        /My next /Another /Here is a )question: | (Tell/Answer) me(:/ this:) | Can you help me? |
        (Next/Another) one(./:) | Thanks. | One more(/ thing): | Dear (assistant/friend/pyserve),
        | Good (evening/ afternoon/day)(./,) | My friend, | I am back.
        """),
        phrases("Good morning. | Quick question: | And another one: | Dear model,"),
    ),
    "es": Split(
        phrases("""
        Por favor, | (Oye/Hola/Bueno/Ahora/Ok/Entonces/Vale/Y), | ¡Hola! | (Tengo una /Una /Otra
        /Mi /Aquí va una )pregunta: | (Dime/Contéstame)(:/ esto:) | ¿Me ayudas? | (Otra cosa/La
        siguiente)(./:) | Gracias. | Una (cosa más/duda/más): | A ver, | Querido
        (asistente/amigo), | (Buenas tardes/Buenas noches/Buen día)(./,) | Amigo mío, | Ya he
        vuelto.
        """),
        phrases("Buenos días. | Una pregunta rápida: | Y otra cosa: | Querido modelo,"),
    ),
}
_SUFFIX = {
    "en": Split(
        phrases("""
        (Thanks/Thank you)(!/./ in advance/ so much/ very much!) | (Please/Please and thank
        you)(/./!) | Very kind of you. | Cheers | I am very grateful.
        """),
        ["Many thanks!"],
    ),
    "es": Split(
        phrases("""
        (¡Gracias!/Gracias/Mil gracias)(/./ de antemano) | (Por favor/Te lo agradezco)(/./ mucho)
        | Muy amable. | Un saludo | (Gracias por todo/Muchísimas gracias)(/./ otra vez)
        """),
        ["¡Muchas gracias!"],
    ),
}


def polite(rng: random.Random, lang: str, template: str, held: bool, *, suffix: bool = True) -> str:
    """Now and then something before or after the question."""
    if rng.random() < 0.15:
        template = f"{_PREFIX[lang].pick(rng, held)} {template}"
    if suffix and rng.random() < 0.06:
        template = f"{template} {_SUFFIX[lang].pick(rng, held)}"
    return template
