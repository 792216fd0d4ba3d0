"""What form of messages a chat template expects, found by rendering small conversations with it.

A template's source does not tell: "for part in content" may loop over the parts of a message, the
messages of a conversation or the characters of a text, and the content may be in a variable of any
name. So when a template is loaded, it renders marked texts in each form once. A form is usable if
the marks come out unchanged.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2

from pyserve.text.template_limits import Meter, TemplateLimitError, metering

# For all probes of one template; with templates of real models they take 10 to 100 ms.
MAX_PROBE_S = 2.0

Form = Literal["text", "parts"]
Absent = Literal["null", "missing", "empty"]
ReasoningPlace = Literal["field", "part"]
# Positions of messages that a template may refuse: a system message at the start, one after other
# messages, a user's message right after another one, and one right after a tool result.
Place = Literal["system", "late system", "row", "user behind result"]
Message = dict[str, Any]

FORMS: tuple[Form, ...] = ("text", "parts")
# None is tried first, because clients send it, and templates that distinguish it from "" write a
# different turn for "".
ABSENT: tuple[Absent, ...] = ("null", "missing", "empty")

# Clients and templates use different names.
REASONING = ("reasoning_content", "reasoning", "thinking")

_FIRST, _SECOND = "qzfirst", "qzsecond"
_KEY, _VALUE = "qzkey", "qzvalue"
_NAME, _ROLE = "qzname", "qzrole"
_CALL_ID = "qzcall001"  # Mistral's templates accept only nine letters or digits
# Find a content part, or arguments, that the template printed whole, as Python or JSON writes them.
_PRINTED_PART = re.compile(rf"""text['"]\s*:\s*['"]{_FIRST}""").search
_PRINTED_ARGUMENTS = re.compile(rf"""'{_KEY}'\s*:""").search
_TOOL = {
    "type": "function",
    "function": {
        "name": "qztool",
        "description": "qztool",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": _KEY}},
            "required": [_KEY],
        },
    },
}


@dataclass(frozen=True, slots=True)
class Traits:
    """What form of messages a template expects.

    content_forms       role -> the forms of content that the template shows. A role that is missing
                        is treated like the user, and if the user is missing, its content is text.
    absent              how to give an assistant's message without content: null, no key, or empty.
    absent_with_calls   the same if the message has tool calls.
    has_text_arguments  the arguments of a tool call must be JSON text instead of an object.
    has_developer       the template has markup of its own for the role developer.
    named_roles         roles whose message.name is shown.
    reasoning           where the template looks for the thinking of earlier turns: in fields of an
                        assistant's message, or in parts of its content; None if it does not show
                        it.
    refused             positions of messages at which the template raises, or which it does not
                        show.
    dropped             those of `refused` that it silently leaves out.
    """

    content_forms: Mapping[str, tuple[Form, ...]]
    absent: Absent = "empty"
    absent_with_calls: Absent = "empty"
    has_text_arguments: bool = False
    has_developer: bool = False
    named_roles: frozenset[str] = frozenset()
    reasoning: ReasoningPlace | None = None
    refused: frozenset[Place] = frozenset()
    dropped: frozenset[Place] = frozenset()

    def forms(self, role: str) -> tuple[Form, ...]:
        return self.content_forms.get(role) or self.content_forms.get("user") or FORMS[:1]


def probe(template: jinja2.Template, variables: Mapping[str, Any]) -> Traits:
    """Find the traits of a template. Never raises.

    variables  what the template gets beside messages, such as bos_token.
    """
    return _Prober(template, variables).traits()


class _Prober:
    def __init__(self, template: jinja2.Template, variables: Mapping[str, Any]) -> None:
        self._template = template
        self._variables = variables
        self._began_s = time.monotonic()
        self._is_over = False
        self._forms: dict[str, tuple[Form, ...]] = {}
        self._arguments: Any = {_KEY: _VALUE}

    def traits(self) -> Traits:
        self._find_forms("user")
        self._find_forms("system")
        self._find_forms("assistant")
        has_text_arguments = self._wants_arguments_as_text()
        if has_text_arguments:
            self._arguments = f'{{"{_KEY}": "{_VALUE}"}}'
        absent_with_calls = self._find_absent(_calls(self._arguments))
        self._find_forms("tool")
        refused, dropped = self._find_refused()
        return Traits(
            refused=refused,
            dropped=dropped,
            content_forms=self._forms,
            absent=self._find_absent({}),
            absent_with_calls=absent_with_calls,
            has_text_arguments=has_text_arguments,
            has_developer=self._knows_developer(),
            named_roles=frozenset(filter(self._shows_name, ("system", "user", "assistant"))),
            reasoning=self._find_reasoning(),
        )

    def _render(self, messages: list[Message], *, has_tools: bool = False) -> str | None:
        """The prompt; None if the template raises, or exceeds a limit."""
        if self._is_over:
            return None
        tools = [_TOOL] if has_tools else None
        data = {**self._variables, "messages": messages, "tools": tools, "documents": None}
        try:
            with metering(Meter(MAX_PROBE_S, data=data, began_s=self._began_s)):
                return self._template.render(data, add_generation_prompt=True)
        except TemplateLimitError:
            self._is_over = True  # each further probe would take as long
            return None
        except Exception:  # a template is code: anything can come out of it
            return None

    def _say(self, role: str, text: str = "qztext", **fields: Any) -> Message:
        """A message in the best form of content that is known so far for its role."""
        form = self._best_form(role)
        return {"role": role, "content": _content(form, [text]), **fields}

    def _best_form(self, role: str) -> Form:
        return Traits(self._forms).forms(role)[0]

    def _conversations(self, message: Message) -> list[list[Message]]:
        """Conversations in which a template may accept this message, depending on its role."""
        role, user, answer = message["role"], self._say("user"), self._say("assistant")
        if role == "user":
            return [[message], [self._say("system"), message]]
        if role == "assistant" and "tool_calls" in message:
            result = self._result()
            return [[user, message], [user, message, result], [user, message, result, answer, user]]
        if role == "assistant":
            return [[user, message, user], [user, message]]
        if role == "tool":
            call = self._say("assistant", **_calls(self._arguments))
            empty = {**call, "content": ""}
            return [[user, call, message], [user, empty, message]]
        return [[message, user]]

    def _result(self) -> Message:
        return self._say("tool", tool_call_id=_CALL_ID, name="qztool")

    def _prompts(self, message: Message) -> Iterator[str | None]:
        """The prompts of all these conversations, without and with tools: a template may need
        either.
        """
        for has_tools in (False, True):
            for conversation in self._conversations(message):
                yield self._render(conversation, has_tools=has_tools)

    def _find_forms(self, role: str) -> None:
        fields = {"tool_call_id": _CALL_ID, "name": "qztool"} if role == "tool" else {}
        found: list[Form] = []
        for form in FORMS:
            content = _content(form, [_FIRST, _SECOND])
            prompts = self._prompts({"role": role, "content": content, **fields})
            if any(_shows(prompt, _FIRST, _SECOND) for prompt in prompts):
                found.append(form)
        if found:
            self._forms[role] = tuple(found)

    def _wants_arguments_as_text(self) -> bool:
        as_text = f'{{"{_KEY}": "{_VALUE}"}}'
        for content in ("", None):
            objects = self._prompts(_assistant(content, _calls({_KEY: _VALUE})))
            if any(_shows(p, _VALUE) and not _PRINTED_ARGUMENTS(p or "") for p in objects):
                return False
            texts = self._prompts(_assistant(content, _calls(as_text)))
            if any(p is not None and as_text in p for p in texts):
                return True
        return False

    def _find_absent(self, fields: Message) -> Absent:
        """The first way of ABSENT that renders in every conversation in which any other way
        renders, without "None" printed in the prompt.
        """
        empty: Any = [] if self._best_form("assistant") == "parts" else ""
        messages: dict[Absent, Message] = {
            "null": _assistant(None, fields),
            "missing": {"role": "assistant", **fields},
            "empty": _assistant(empty, fields),
        }
        prompts = {name: list(self._prompts(message)) for name, message in messages.items()}
        for name in ABSENT:
            if _is_rendered(prompts[name], prompts.values()):
                return name
        return "empty"

    def _knows_developer(self) -> bool:
        """Whether the role developer is written differently from an unknown role."""
        roles = (self._prompts(self._say(role, _FIRST)) for role in ("developer", _ROLE, "system"))
        for known, other, system in zip(*roles, strict=True):
            other = (other or "").casefold().replace(_ROLE, "developer")
            if known is None or known.casefold() == other:
                continue
            if _shows(known, _FIRST) or not _shows(system, _FIRST):
                return True
        return False

    def _find_reasoning(self) -> ReasoningPlace | None:
        """Where thinking is shown. It is tried with and without a tool call, because many templates
        show only the thinking that led to a call, or that of the last turn.
        """
        in_fields = self._say("assistant", **dict.fromkeys(REASONING, _SECOND))
        as_part = {**in_fields, "content": [thinking_part(_SECOND), *_content("parts", [_FIRST])]}
        ways: tuple[tuple[ReasoningPlace, Message, tuple[str, ...]], ...] = (
            ("field", in_fields, (_SECOND,)), ("part", as_part, (_FIRST, _SECOND)),
        )  # fmt: skip
        for place, message, marks in ways:
            for calls in ({}, _calls(self._arguments)):
                prompts = self._prompts({**message, **calls})
                if any(_shows(prompt, *marks) for prompt in prompts):
                    return place
        return None

    def _find_refused(self) -> tuple[frozenset[Place], frozenset[Place]]:
        """The positions that the template refuses, and those of them that it silently drops."""
        refused: set[Place] = set()
        dropped: set[Place] = set()
        user, answer = self._say("user"), self._say("assistant")
        system, again = self._say("system", _FIRST), self._say("user", _FIRST)
        called = [user, self._say("assistant", **_calls(self._arguments)), self._result()]
        head = [self._say("system")] if "system" in self._forms else []
        places: dict[Place, tuple[list[Message], ...]] = {
            "system": ([system, user],),
            "late system": ([*head, user, answer, system, user], [*head, user, system]),
            "row": ([*head, user, again],),
            "user behind result": ([*head, *called, again],),
        }
        everything = [system, user, again, system, answer, system, *called, again, system]
        if "user" not in self._forms or self._shows_all(everything):
            return frozenset(), frozenset()
        for place, conversations in places.items():
            for messages in conversations:
                prompts = [self._render(messages, has_tools=has) for has in (False, True)]
                if any(_shows(prompt, _FIRST) for prompt in prompts):
                    continue
                refused.add(place)
                if any(prompt is not None for prompt in prompts):
                    dropped.add(place)
        return frozenset(refused), frozenset(dropped)

    def _shows_all(self, messages: list[Message]) -> bool:
        """Whether the template shows every mark in a conversation, as most templates do."""
        num_marks = sum(_FIRST in str(message["content"]) for message in messages)
        prompt = self._render(messages)
        return _shows(prompt, _FIRST) and (prompt or "").casefold().count(_FIRST) >= num_marks

    def _shows_name(self, role: str) -> bool:
        prompts = self._prompts(self._say(role, name=_NAME))
        return any(_shows(prompt, _NAME) for prompt in prompts)


def thinking_part(text: str) -> Message:
    """A content part with an assistant's thinking, in the form that Mistral's templates read."""
    return {"type": "thinking", "thinking": text}


def _content(form: Form, texts: Sequence[str]) -> Any:
    if form == "text":
        return " ".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _calls(arguments: Any) -> Message:
    function = {"name": "qztool", "arguments": arguments}
    return {"tool_calls": [{"id": _CALL_ID, "type": "function", "function": function}]}


def _assistant(content: Any, fields: Message) -> Message:
    return {"role": "assistant", "content": content, **fields}


def _shows(prompt: str | None, *marks: str) -> bool:
    """Whether all marks are in the prompt as text. Letter case is ignored, because some templates
    write everything in capitals.
    """
    text = (prompt or "").casefold()
    return all(mark in text for mark in marks) and not _PRINTED_PART(text)


def _is_rendered(prompts: list[str | None], others: Iterable[list[str | None]]) -> bool:
    """Whether there is a prompt wherever one of the others has one, with no more "None" in it."""
    for prompt, *alternatives in zip(prompts, *others, strict=True):
        fewest = min((a.count("None") for a in alternatives if a is not None), default=None)
        if fewest is not None and (prompt is None or prompt.count("None") > fewest):
            return False
    return any(prompt is not None for prompt in prompts)
