"""Answers in each format, and what is in them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyserve.text.parts import Content, Part, ToolCall, content_of, tool_calls_of
from pyserve.text.tool_parsers.registry import make_parser
from pyserve.text.tool_parsers.stage import Tools

PARAMETERS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"enum": ["celsius", "fahrenheit"]},
            "limit": {"anyOf": [{"type": "number"}, {"type": "null"}]},
            "where": {"type": "object"},
            "is_new": {"type": "boolean"},
        },
    },
    "now": {"type": "object", "properties": {}},
}


@dataclass(frozen=True)
class Answer:
    """calls: (name, the text of the arguments), in their order."""

    parser: str
    text: str
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def parts_of(parser: str, pieces: Sequence[str], **tools: Any) -> list[list[Part]]:
    """What each piece gives, and the end."""
    stage = make_parser(parser, Tools(parameters=PARAMETERS, **tools))
    return [*(list(stage.push(Content(piece))) for piece in pieces), list(stage.flush())]


def found_in(parser: str, pieces: Sequence[str], **tools: Any) -> tuple[str, list[tuple[str, str]]]:
    """The content and the calls of an answer that comes in pieces; checks the calls' pieces."""
    parts = [part for some in parts_of(parser, pieces, **tools) for part in some]
    check_pieces(parts)
    return content_of(parts), [(call.name or "", call.arguments) for call in tool_calls_of(parts)]


def check_pieces(parts: Sequence[Part]) -> None:
    """Name and id come whole, once and first, and calls one after the other."""
    ids = set()
    index = -1
    for part in parts:
        if isinstance(part, Content):
            assert part.text
        if isinstance(part, ToolCall):
            if part.index != index:
                index += 1
                assert part.index == index
                assert part.name and part.id and part.id not in ids
                ids.add(part.id)
            else:
                assert part.name is None and part.id is None and part.arguments


def every_cut(text: str, max_chars: int) -> Iterator[list[str]]:
    """All ways to cut a text of at most `max_chars`; of a longer one, its beginning so."""
    head, rest = text[:max_chars], text[max_chars:]
    for cuts in itertools.product((False, True), repeat=len(head)):
        pieces, start = [], 0
        for at, is_cut in enumerate(cuts, 1):
            if is_cut:
                pieces.append(head[start:at])
                start = at
        yield [*pieces, head[start:] + rest]


def some_cuts(text: str, count: int, seed: int) -> Iterator[list[str]]:
    """Cuts at random places: few, and many."""
    rng = random.Random(seed)
    for _ in range(count):
        num_cuts = rng.randint(0, rng.choice((3, 10, len(text))))
        cuts = sorted(rng.choices(range(len(text) + 1), k=num_cuts))
        yield [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


WEATHER = '{"city": "Paris", "days": 2}'
PARIS = ("get_weather", WEATHER)
NOW = ("now", "{}")
HARD_JSON = (
    '{"city": "a </tool_call> \\"b\\" [TOOL_CALLS] ]}; \\u00e9 \\\\", "where": {"x": [1, -2.5e3, []'
    ', {}, [{"y": null}], true,false ]  }}'
)
HARD = ("get_weather", HARD_JSON)
BEGIN, END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"


def hermes(*calls: tuple[str, str]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
        for name, arguments in calls
    )


def as_list(*calls: tuple[str, str], key: str = "arguments") -> str:
    return f"[{as_objects(*calls, key=key, between=', ')}]"


def as_objects(*calls: tuple[str, str], key: str = "arguments", between: str = "; ") -> str:
    return between.join(f'{{"name": "{name}", "{key}": {text}}}' for name, text in calls)


def deepseek(*calls: tuple[str, str]) -> str:
    return "".join(
        ["<｜tool▁calls▁begin｜>"]
        + [f"{BEGIN}function<｜tool▁sep｜>{n}\n```json\n{a}\n```{END}" for n, a in calls]
        + ["<｜tool▁calls▁end｜>"]
    )


def qwen(name: str, **values: str) -> str:
    lines = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>"


ALL = (PARIS, NOW, HARD)
ANSWERS = [
    Answer("hermes", hermes(PARIS), "", (PARIS,)),
    Answer("hermes", "\n\n" + hermes(*ALL) + "\n", "", ALL),
    Answer("hermes", f"I look.\n{hermes(PARIS)}\nand {hermes(NOW)} end", "I look.\nand end",
           (PARIS, NOW)),
    Answer("hermes", '<tool_call>{"arguments": {"city": "x"}, "name": "now"}</tool_call>', "",
           (("now", '{"city": "x"}'),)),
    Answer("hermes", '<tool_call>{"name": "now"}</tool_call>', "", (NOW,)),
    Answer("hermes", '<tool_call>{"name": "now", "arguments": null}', "", (NOW,)),
    Answer("hermes", '<tool_call>{"name":"now","arguments":"{\\"a\\": 1}"}</tool_call>', "",
           (("now", '{"a": 1}'),)),
    Answer("hermes", '<tool_call>{"type":"function","function":{"name":"now","parameters":{}}}',
           "", (NOW,)),
    # A brace too few, one too many, and a line break and an escape that JSON does not have.
    Answer("hermes", '<tool_call>{"name": "now", "arguments": {}\n</tool_call>', "", (NOW,)),
    Answer("hermes", '<tool_call>{"name": "now", "arguments": {}}}\n</tool_call>', "", (NOW,)),
    Answer("hermes", '<tool_call>{"name": "now", "arguments": {"a": "b\n\\d\\\'"}}', "",
           (("now", '{"a": "b\\n\\\\d\'"}'),)),
    Answer("mistral", f"[TOOL_CALLS] {as_list(*ALL)}", "", ALL),
    Answer("mistral", f"Sure[TOOL_CALLS]{as_list(PARIS)}", "Sure", (PARIS,)),
    Answer("mistral", f"[TOOL_CALLS]get_weather[ARGS]{WEATHER}[TOOL_CALLS]now[ARGS]{{}}", "",
           (PARIS, NOW)),
    Answer("mistral", f"[TOOL_CALLS]get_weather{WEATHER}", "", (PARIS,)),
    Answer("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{HARD_JSON}", "", (HARD,)),
    Answer("llama3_json", as_objects(*ALL, key="parameters"), "", ALL),
    Answer("llama3_json", f"<|python_tag|>{as_objects(PARIS, key='parameters')}", "", (PARIS,)),
    Answer("llama3_json", f" hm <|python_tag|>{as_objects(PARIS, NOW)}", " hm", (PARIS, NOW)),
    Answer("granite", f"<|tool_call|>{as_list(*ALL)}", "", ALL),
    Answer("granite", f"<tool_call>{as_list(PARIS)}", "", (PARIS,)),
    Answer("granite", as_list(PARIS, NOW), "", (PARIS, NOW)),
    Answer("phi4_mini_json", f"functools{as_list(*ALL)}", "", ALL),
    Answer("phi4_mini_json", f"functools{as_list(PARIS, key='parameters')}", "", (PARIS,)),
    Answer("deepseek_v3", deepseek(*ALL), "", ALL),
    Answer("deepseek_v3", f"Well.\n\n{deepseek(PARIS)}", "Well.", (PARIS,)),
    Answer("deepseek_v3", f"{BEGIN}function<｜tool▁sep｜>now\n```json\n{{}}\n```", "", (NOW,)),
    Answer("deepseek_v3", f"<｜tool▁calls▁begin｜>{BEGIN}now<｜tool▁sep｜>{{}}{END}", "", (NOW,)),
    Answer("pythonic", '[get_weather(city="Paris", days=2), now()]', "", (PARIS, NOW)),
    Answer("pythonic", "<|python_start|>[now()]<|python_end|>", "", (NOW,)),
    Answer(
        "pythonic",
        "[get_weather(city='it\\'s \"a\" \\u00e9', where={'a': [1_000, -.5, None, True,], \"b\": {}"
        '}, unit="""x\ny""", limit=null, )]',
        "",
        (("get_weather", '{"city": "it\'s \\"a\\" é", "where": {"a": [1000, -0.5, null, true], '
          '"b": {}}, "unit": "x\\ny", "limit": null}'),),
    ),
    Answer("qwen3_coder", qwen("get_weather", city="Paris", days="2"), "", (PARIS,)),
    Answer("qwen3_coder", f"Ok.\n{qwen('now')}\n{qwen('now')}", "Ok.", (NOW, NOW)),
    Answer(
        "qwen3_coder",
        qwen("get_weather", city='\n two\nlines "q" </param \n', days="x", unit="12", limit="None",
             where="{'a': 1}", is_new="True", other="[1]"),
        "",
        (("get_weather", '{"city": "\\n two\\nlines \\"q\\" </param \\n", "days": "x", '
          '"unit": "12", "limit": null, "where": {"a": 1}, "is_new": true, "other": [1]}'),),
    ),
    Answer("qwen3_coder", "<function=now>\n</function>", "", (NOW,)),
]  # fmt: skip
# No calls, or no longer: all of it is content.
TEXTS = [
    ("hermes", "Use <tool_call> like this: <tool_call>{}</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "arguments": 5}</tool_call>'),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>\n{"name": "get_we'),
    ("hermes", '<tool_call>{"arguments": {"a": 1}'),
    ("hermes", '<tool_call>{"name": "now", "arguments": "no"}'),
    ("hermes", "a < b <tool <tool_ca"),
    ("hermes", " \n white space \n\n"),
    ("hermes", '{"name": "now", "arguments": {}}'),
    ("mistral", "[TOOL_CALLS] I cannot do that."),
    ("mistral", "[TOOL_CALLS]"),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", "[TOOL_CALLS]now[ARGS]"),
    ("llama3_json", '{"name": "John Smith", "parameters": {}}'),
    ("llama3_json", '{"name": "now"}'),
    ("llama3_json", '{"city": "Paris", "name": "now", "parameters": {}}'),
    ("llama3_json", '<|python_tag|>print("x")'),
    ("llama3_json", "  "),
    ("granite", "[1, 2]"),
    ("granite", '[{"name": "other", "arguments": {}}]'),
    ("phi4_mini_json", "functools is a module, functools [x]"),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>no<｜tool▁calls▁end｜>"),
    ("pythonic", "[link](now)"),
    ("pythonic", "[now(1)]"),
    ("pythonic", "[other(a=1)]"),
    ("pythonic", "see [now()]"),
    ("qwen3_coder", "<tool_call>\n{}</tool_call>"),
    ("qwen3_coder", "<function=a\nb></function>"),
]
