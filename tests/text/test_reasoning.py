"""Thinking told from the answer: every format, every way to cut the text, markers as tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from pyserve.errors import ConfigError
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.parts import Content, Part, Reasoning, content_of, joined, reasoning_of
from pyserve.text.reasoning import (
    FORMATS,
    MAX_LEADING_SPACE,
    Opening,
    ReasoningParser,
    ReasoningStage,
    check_name,
)
from pyserve.text.tokenizer import Tokenizer
from tests.api.fakes import make_tokenizer_folder

R1 = FORMATS["deepseek_r1"]
GRANITE = FORMATS["granite"]
OPENINGS: tuple[Opening, ...] = ("open", "closed", "unsaid")
SPACE = " " * MAX_LEADING_SPACE

# Format, where the prompt leaves it, text -> reasoning, content.
CASES: tuple[tuple[str, Opening, str, str, str], ...] = (
    ("deepseek_r1", "unsaid", "<think>a\n</think>\n\nb", "a\n", "\n\nb"),
    ("deepseek_r1", "unsaid", "\n <think>\na</think>", "\na", ""),
    ("deepseek_r1", "unsaid", "<think></think>b", "", "b"),
    ("deepseek_r1", "unsaid", "<think>a", "a", ""),
    ("deepseek_r1", "unsaid", "<think>a</thi", "a</thi", ""),
    ("deepseek_r1", "unsaid", "<think>a</thi</think>b", "a</thi", "b"),
    ("deepseek_r1", "unsaid", "<think>1 < 2</ think></think>", "1 < 2</ think>", ""),
    ("deepseek_r1", "unsaid", "<think>a</think>b</think><think>c", "a", "b</think><think>c"),
    ("deepseek_r1", "unsaid", "Hi", "", "Hi"),
    ("deepseek_r1", "unsaid", " \n", "", " \n"),
    ("deepseek_r1", "unsaid", "", "", ""),
    ("deepseek_r1", "unsaid", " <thin", "", " <thin"),
    ("deepseek_r1", "unsaid", "<thinking>a</thinking>", "", "<thinking>a</thinking>"),
    ("deepseek_r1", "unsaid", "In <think>a</think>", "", "In <think>a</think>"),
    ("deepseek_r1", "unsaid", "</think>b", "", "b"),
    ("deepseek_r1", "unsaid", f"{SPACE}<think>a", "a", ""),
    ("deepseek_r1", "unsaid", f"{SPACE} <think>a", "", f"{SPACE} <think>a"),
    ("deepseek_r1", "open", "a</think>b", "a", "b"),
    ("deepseek_r1", "open", "\na", "\na", ""),
    ("deepseek_r1", "open", "\n<think>a</think>b", "a", "b"),
    ("deepseek_r1", "open", "</think>b", "", "b"),
    ("deepseek_r1", "open", "", "", ""),
    ("deepseek_r1", "open", " <th", " <th", ""),
    ("deepseek_r1", "closed", "<think>a</think>b", "", "<think>a</think>b"),
    ("qwen3", "unsaid", "<think>a<tool_call>b</tool_call>", "a", "<tool_call>b</tool_call>"),
    ("qwen3", "open", "a<tool</think>b", "a<tool", "b"),
    ("kimi_k2", "unsaid", "<think>a<|tool_calls_section_begin|>b", "a",
     "<|tool_calls_section_begin|>b"),
    ("mistral", "unsaid", "[THINK]a[x][/THINK]b[/THINK]", "a[x]", "b[/THINK]"),
    ("mistral", "unsaid", "[THIN", "", "[THIN"),
    ("seed_oss", "unsaid", "<seed:think>a</think></seed:think>b", "a</think>", "b"),
    ("granite", "unsaid", "Here is my thought process:\na\nHere is my response:\nb", "\na\n",
     "\nb"),
    ("granite", "unsaid", "Here's my thought process: aHere's my response: b", " a", " b"),
    ("granite", "unsaid", "Here is my cat: Here is my response: b", "",
     "Here is my cat: Here is my response: b"),
    ("granite", "unsaid", "Here is my thought process: Here is Here", " Here is Here", ""),
)  # fmt: skip


def parts_of(stage: ReasoningStage, pieces: list[str]) -> list[Part]:
    """The parts of an answer that comes in `pieces`, each of them with a number for its token."""
    parts: list[Part] = []
    for i, piece in enumerate(pieces):
        parts += stage.push(Content(piece, (i,)))
    return [*parts, *stage.flush()]


def texts_of(parts: list[Part]) -> list[tuple[type, str]]:
    """Kind and text of the parts that have one, joined."""
    found = [part for part in joined(parts) if isinstance(part, Content | Reasoning)]
    return [(type(part), part.text) for part in found if part.text]


def cuts_of(text: str) -> Iterator[list[str]]:
    """Every way to cut a short text; of a long one each single cut, its characters, and some."""
    places = range(1, len(text))
    if len(text) <= 12:
        chosen: list[tuple[int, ...]] = []
        for number in range(len(text)):
            chosen += combinations(places, number)
    else:
        rng = random.Random(text)
        chosen = [(), tuple(places), *((place,) for place in places)]
        for _ in range(100):
            size = rng.randrange(1, len(text))
            chosen.append(tuple(sorted(rng.sample(places, size))))
    for cuts in chosen or [()]:
        bounds = [0, *cuts, len(text)]
        yield [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]


@pytest.mark.parametrize(("name", "opening", "text", "reasoning", "content"), CASES)
def test_every_cut_gives_the_same(
    name: str, opening: Opening, text: str, reasoning: str, content: str
) -> None:
    for pieces in cuts_of(text):
        parts = parts_of(ReasoningStage(FORMATS[name], opening), pieces)
        assert (reasoning_of(parts), content_of(parts)) == (reasoning, content), pieces
        kinds = [kind for kind, _ in texts_of(parts)]
        assert kinds in ([], [Reasoning], [Content], [Reasoning, Content]), pieces
        tokens = [token for part in parts for token in part.tokens]
        assert tokens == list(range(len(pieces)))  # each once, in their order


@pytest.mark.parametrize("name", FORMATS)
def test_random_texts_of_pieces_of_markers(name: str) -> None:
    format = FORMATS[name]
    markers = [*format.starts, *format.ends, *format.next_ends]
    rng = random.Random(name)
    for _ in range(300):
        text = ""
        for _ in range(rng.randrange(1, 8)):
            marker = rng.choice(markers)
            text += rng.choice([marker, marker[: rng.randrange(len(marker))], "a", " ", "\n", "<"])
        for opening in OPENINGS:
            places = sorted(rng.sample(range(len(text) + 1), min(len(text), 6)))
            bounds = [0, *places, len(text)]
            pieces = [text[a:b] for a, b in zip(bounds, bounds[1:], strict=False)]
            whole = texts_of(parts_of(ReasoningStage(format, opening), [text]))
            for cut in (list(text), pieces):
                assert texts_of(parts_of(ReasoningStage(format, opening), cut)) == whole, cut


@pytest.mark.parametrize("is_hidden", [False, True])
def test_no_token_is_kept_once_the_thinking_is_over(is_hidden: bool) -> None:
    stage = ReasoningStage(R1, "unsaid", is_hidden=is_hidden)
    assert stage.push(Content("<think>", (1,))) == []
    shown = [] if is_hidden else [Reasoning("a", (1, 2))]
    assert stage.push(Content("a", (2,))) == shown
    assert stage.push(Content("</thi", (3,))) == stage.push(Content("", (4,))) == []
    assert stage.push(Content("nk>", (5,))) == [Content("", (3, 4, 5))]
    stage = ReasoningStage(R1, "unsaid", is_hidden=is_hidden)
    assert stage.push(Content("</think>", (1,))) == [Content("", (1,))]


def test_thinking_is_not_held_back() -> None:
    stage = ReasoningStage(R1, "unsaid")
    assert stage.push(Content("<think>")) == []
    assert stage.has_begun and not stage.is_over
    assert stage.push(Content("So a <")) == [Reasoning("So a ")]
    assert stage.push(Content("b")) == [Reasoning("<b")]
    assert stage.push(Content("</think>\n")) == [Content("\n")]
    assert stage.is_over
    content = Content("c < d </thi")
    assert stage.push(content) == (content,)
    stage = ReasoningStage(R1, "unsaid")
    assert stage.push(Content("Hi")) == [Content("Hi")]
    assert stage.is_over and not stage.has_begun


@pytest.mark.parametrize(("name", "opening", "text", "reasoning", "content"), CASES)
def test_hidden_thinking(
    name: str, opening: Opening, text: str, reasoning: str, content: str
) -> None:
    pieces = list(text)
    parts = parts_of(ReasoningStage(FORMATS[name], opening, is_hidden=True), pieces)
    assert reasoning_of(parts) == "" and content_of(parts) == content
    tokens = [token for part in parts for token in part.tokens]
    assert tokens == sorted(tokens) and len(tokens) >= len(content)
    if reasoning and content:  # what is known of the tokens tells their text
        assert min(tokens) >= text.index(reasoning) + len(reasoning)


def test_no_marker_of_a_format_is_part_of_another_one() -> None:
    for name, format in FORMATS.items():
        markers = [*format.starts, *format.ends, *format.next_ends]
        for marker in markers:
            assert marker == marker.strip() and marker, name
            assert [other for other in markers if marker in other] == [marker], name


def test_names() -> None:
    for known in (*FORMATS, "none", None):
        check_name(known)
    for name in ("deepseek", "", "QWEN3"):
        with pytest.raises(ConfigError, match="--reasoning-parser must be one of deepseek_r1, "):
            check_name(name)


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of which [THINK] and [/THINK] are special tokens."""
    folder = make_tokenizer_folder(tmp_path_factory.mktemp("special"))
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token in ("[THINK]", "[/THINK]", "[ARGS]")]
    )
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_folder(make_tokenizer_folder(tmp_path_factory.mktemp("plain")))


def test_a_parser_that_does_not_suit_the_model_is_named(
    special: Tokenizer, plain: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    assert ReasoningParser.named(None, plain) is ReasoningParser.named("none", plain) is None
    for name, tokenizer in (("mistral", special), ("granite", plain)):
        assert ReasoningParser.named(name, tokenizer) is not None
    assert not caplog.records
    parser = ReasoningParser.named("mistral", plain)
    assert parser is not None and parser.format == FORMATS["mistral"]
    assert "mistral looks for [THINK], which is no token" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "continued", "opening"),
    [
        ("<|im_start|>assistant\n", None, "unsaid"),
        ("<|im_start|>assistant\n<think>\n", None, "open"),
        ("<|im_start|>assistant\n<think>", None, "open"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", None, "closed"),
        ("</think>", None, "closed"),
        ("<think>a</think>b<|im_end|>\n<|im_start|>assistant\n", None, "unsaid"),
        ("say <think><|im_end|>\n<|im_start|>assistant\n", None, "unsaid"),
        ("<|im_start|>assistant\n<think>\nSo", "<think>\nSo", "open"),
        ("<|im_start|>assistant\n<think>a</think>So", "<think>a</think>So", "closed"),
        ("<|im_start|>assistant\nSo", "So", "closed"),
        ("<|im_start|>assistant\n", " ", "unsaid"),
        ("<|im_start|>assistant\n<think>\nSo", "So", "closed"),
        ("x" * 3000 + "<think>", None, "open"),
    ],
)
def test_where_a_prompt_leaves_the_answer(
    plain: Tokenizer, prompt: str, continued: str | None, opening: Opening
) -> None:
    parser = ReasoningParser("deepseek_r1", plain)
    ids = plain.encode(prompt, add_special_tokens=False)
    assert parser.opening(ids, continued=continued) == opening
    assert parser.stage(opening).is_over is (opening == "closed")


def test_markers_that_are_special_tokens_are_seen(special: Tokenizer) -> None:
    parser = ReasoningParser("mistral", special)
    ids = special.encode("[THINK]Hello[/THINK] world[/THINK][ARGS]", add_special_tokens=False)
    assert len(parser.marker_ids) == 2
    text = Detokenizer(special, skip_special_tokens=True, shown=parser.marker_ids)
    assert text.push(ids) + text.flush() == "[THINK]Hello[/THINK] world[/THINK]"
    text = Detokenizer(special, skip_special_tokens=True, shown=parser.marker_ids)
    behind = ids.index(next(iter(special.encode("[/THINK]", add_special_tokens=False)))) + 1
    shown = text.push(ids[:behind])
    text.hide(parser.marker_ids)
    assert (shown, text.push(ids[behind:])) == ("[THINK]Hello[/THINK]", " world")
    assert ReasoningParser("deepseek_r1", special).marker_ids == frozenset()
