"""The thinking that a model writes before its answer: text -> reasoning and content.

A format is one row: the markers around the thinking. Whether the thinking has begun is seen from
the end of the prompt, since some templates write the opening marker themselves, and others close
the thinking at once to turn it off. Otherwise it is seen from the start of the answer. Without an
opening marker in either place there is no thinking, only an answer. White space around the markers
is kept, as in vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import msgspec

from pyserve.errors import ConfigError
from pyserve.log import get_logger
from pyserve.text.grammar_constraint import FreeUntil
from pyserve.text.parts import Content, Part, Reasoning
from pyserve.text.tokenizer import Tokenizer

MAX_LEADING_SPACE = 64  # white space in front of an opening marker
TAIL_TOKENS = 48  # tokens at the end of a prompt that are searched for a marker

# Where the answer begins, by its prompt: within the thinking, after it, or unknown.
Opening = Literal["open", "closed", "unsaid"]


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """The markers of one format. None of them is part of another one.

    starts     each of them opens the thinking.
    ends       each of them closes the thinking; the first is used to close it by force.
    next_ends  also close the thinking, but belong to what follows it.
    """

    starts: tuple[str, ...]
    ends: tuple[str, ...]
    next_ends: tuple[str, ...] = ()


_THINK = ReasoningFormat(("<think>",), ("</think>",))
_THINK_OR_CALL = ReasoningFormat(("<think>",), ("</think>",), ("<tool_call>",))
FORMATS: dict[str, ReasoningFormat] = {
    **dict.fromkeys(
        ("deepseek_r1", "deepseek_v3", "deepseek_v4", "glm45", "glm47", "holo2", "minimax_m2",
         "olmo3", "poolside_v1", "step3"),
        _THINK,
    ),
    **dict.fromkeys(("mimo", "qwen3"), _THINK_OR_CALL),
    "granite": ReasoningFormat(
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),
    "kimi_k2": ReasoningFormat(("<think>",), ("</think>",), ("<|tool_calls_section_begin|>",)),
    "mistral": ReasoningFormat(("[THINK]",), ("[/THINK]",)),
    "seed_oss": ReasoningFormat(("<seed:think>",), ("</seed:think>",)),
}  # fmt: skip


def opened_thinking(tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> str:
    """The <think> at the end of a prompt with the white space behind it; "" if there is none."""
    tail = tokenizer.decode(prompt_token_ids[-TAIL_TOKENS:], skip_special_tokens=False)
    marker = _THINK.starts[0]
    end = len(tail.rstrip())
    return tail[end - len(marker) :] if tail[:end].endswith(marker) else ""


class ReasoningParser:
    """A format together with the tokenizer of the model that writes it.

    marker_ids  markers that are special tokens, which the text must show while thinking is looked
                for. Those of next_ends are not among them: the stage that reads what follows shows
                its own.
    """

    def __init__(self, name: str, tokenizer: Tokenizer) -> None:
        """Make the parser with a name of FORMATS."""
        self.format = FORMATS[name]
        self._tokenizer = tokenizer
        ids = {tokenizer.token_to_id(m) for m in (*self.format.starts, *self.format.ends)}
        self.marker_ids = tokenizer.special_token_ids & ids

    @classmethod
    def named(cls, name: str | None, tokenizer: Tokenizer) -> ReasoningParser | None:
        """The parser for a name that `check_name` accepts; None if it names no format. Logs a
        warning if the opening marker is not a token of the model.
        """
        if name not in FORMATS:
            return None
        parser = cls(name, tokenizer)
        start = parser.format.starts[0]
        if " " not in start and tokenizer.token_to_id(start) is None:
            get_logger().warning(
                "--reasoning-parser %s looks for %s, which is no token of this model: it may think "
                "between other markers, or not at all", name, start,
            )  # fmt: skip
        return parser

    def opening(self, prompt_token_ids: Sequence[int], *, continued: str | None = None) -> Opening:
        """Where the answer begins, by its prompt.

        continued  the text of the last message if the answer continues it.

        Only the end of the prompt is searched, because earlier messages may contain markers too.
        """
        format = self.format
        tail = self._tokenizer.decode(prompt_token_ids[-TAIL_TOKENS:], skip_special_tokens=False)
        tail = tail.rstrip()
        if tail.endswith(format.starts):
            return "open"
        if tail.endswith(format.ends):
            return "closed"
        if continued is None or not continued.strip():
            return "unsaid"
        start = max(map(continued.rfind, format.starts))
        end = max(map(continued.rfind, format.ends))
        return "open" if start > end else "closed"

    def free_until(self, opening: Opening) -> FreeUntil | None:
        """The thinking before an answer that a grammar constrains; None if there is none."""
        if opening == "closed":
            return None
        starts = self.format.starts if opening == "unsaid" else ()
        return FreeUntil(self.format.ends, self.format.next_ends, starts)

    def stage(self, opening: Opening, *, is_hidden: bool = False) -> ReasoningStage:
        """The stage for one answer. is_hidden: thinking is recognised, but left out."""
        return ReasoningStage(self.format, opening, self.marker_ids, is_hidden=is_hidden)


class ReasoningStage:
    """Separates the thinking of one answer from its content, however the text is cut.

    is_over     from now on everything is content.
    has_begun   the answer or its prompt has opened the thinking.
    marker_ids  special tokens that the text need not show any more once the thinking is over.
    """

    def __init__(
        self,
        format: ReasoningFormat,
        opening: Opening,
        marker_ids: frozenset[int] = frozenset(),
        *,
        is_hidden: bool = False,
    ) -> None:
        self.is_over = opening == "closed"
        self.has_begun = opening == "open"
        self.marker_ids = marker_ids
        self._format = format
        self._is_hidden = is_hidden
        self._is_at_start = not self.is_over
        self._held = ""
        self._tokens: tuple[Any, ...] = ()
        self._find_end = _pattern((*format.ends, *format.next_ends)).search

    def push(self, content: Content) -> Sequence[Part]:
        if self.is_over:
            return (content,)
        self._tokens += content.tokens
        text, self._held = self._held + content.text, ""
        parts = self._read(text)
        if self._is_hidden and self.has_begun:
            shown: list[Part] = [part for part in parts if isinstance(part, Content)]
            if not self.is_over and len(shown) < len(parts):
                self._tokens = content.tokens if self._held else ()
            parts = shown
        return self._with_tokens(parts)

    def flush(self) -> Sequence[Part]:
        text, self._held = self._held, ""
        if self.has_begun and not self.is_over:
            if self._is_hidden:
                return ()
            return self._with_tokens([Reasoning(text)] if text or self._tokens else [])
        return self._with_tokens([Content(text)] if text or self._tokens else [])

    def _read(self, text: str) -> list[Part]:
        """The parts of `text` whose kind is known; the rest is held back."""
        if self._is_at_start:
            behind = self._pass_start(text)
            if behind is None:
                self._held = text
                return []
            text = behind
            self._is_at_start = False
        if self.is_over:
            return [Content(text)] if text else []
        match = self._find_end(text)
        if match is None:
            return [Reasoning(text)] if text else []
        before = text[: match.start()]
        if match["whole"] is None:
            self._held = match[0]
            return [Reasoning(before)] if before else []
        self.is_over = True
        behind = text[match.start() if match[0] in self._format.next_ends else match.end() :]
        parts: list[Part] = [Reasoning(before)] if before else []
        return [*parts, Content(behind)] if behind else parts

    def _pass_start(self, text: str) -> str | None:
        """The text after an opening marker, or all of it if there is no marker; None if more text
        is needed to tell.
        """
        stripped = text.lstrip()
        if len(text) - len(stripped) <= MAX_LEADING_SPACE:
            for marker in self._format.starts:
                if stripped.startswith(marker):
                    self.has_begun = True
                    return stripped[len(marker) :]
            for marker in self._format.ends:  # a closing marker without an opening one is dropped
                if stripped.startswith(marker) and not self.has_begun:
                    self.is_over = True
                    return stripped[len(marker) :]
            markers = (*self._format.starts, *self._format.ends)
            if any(marker.startswith(stripped) for marker in markers):
                return None
        self.is_over = not self.has_begun
        return text

    def _with_tokens(self, parts: list[Part]) -> list[Part]:
        """`parts`, the last of them with all collected tokens.

        Once the thinking is over no tokens are kept back, because this stage may never be called
        again.
        """
        if self._tokens and self.is_over and not parts:
            parts = [Content("")]
        if self._tokens and parts:
            parts[-1] = msgspec.structs.replace(parts[-1], tokens=self._tokens)
            self._tokens = ()
        return parts


@cache
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern that finds the first marker, as group "whole", or the beginning of one at the
    text's end.
    """
    whole = "|".join(map(re.escape, markers))
    begun = "|".join(re.escape(m[:size]) for m in markers for size in range(len(m) - 1, 0, -1))
    return re.compile(f"(?P<whole>{whole})|(?:{begun})\\Z")


def check_name(name: str | None) -> None:
    """Raise ConfigError unless the name is None, "none" or a format's."""
    if name is not None and name not in FORMATS and name != "none":
        names = ", ".join([*sorted(FORMATS), "none"])
        raise ConfigError(f"--reasoning-parser must be one of {names}, got {name[:100]}")
