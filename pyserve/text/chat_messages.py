"""Messages as clients send them -> messages in the form that a chat template expects.

template_probe.py has found out which form that is. If the template raises nevertheless, the other
forms that it may accept are tried.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from pyserve import any_json
from pyserve.errors import InvalidRequestError, NotBuiltError
from pyserve.text.template_probe import (
    FORMS,
    REASONING,
    Absent,
    Form,
    Place,
    Traits,
    thinking_part,
)
from pyserve.text.turn_order import has_system, in_order, is_late_system

PART_TYPES = ("text", "refusal")  # types of content parts whose text is used


def attempts(
    messages: Sequence[Mapping[str, Any]], traits: Traits
) -> Iterator[tuple[list[Any], str]]:
    """Yield the messages in the form that the template expects, then in others that it may accept,
    each with a description of what was done to their order (see turn_order.in_order).

    Raises InvalidRequestError or NotBuiltError if a message has the wrong form.
    """
    if not messages:
        raise InvalidRequestError("messages must hold at least one message", "messages")
    checked = [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    ordered, done = in_order(checked, traits.refused)
    is_kept = not _is_dropped(checked, traits.dropped)
    for each, what in ((checked, ""), (ordered, done)):
        if not (is_kept if each is checked else done):
            continue
        tried: list[Traits] = []
        for way in (traits, *(_only(form, traits) for form in FORMS)):
            prepared = _prepare(each, way)
            if all(prepared != _prepare(each, other) for other in tried):
                yield prepared, what
            tried.append(way)


def _is_dropped(messages: Sequence[Mapping[str, Any]], dropped: frozenset[Place]) -> bool:
    """Whether the template would silently leave out a system message."""
    if "system" in dropped and has_system(messages):
        return True
    return "late system" in dropped and is_late_system(messages)


def _only(form: Form, traits: Traits) -> Traits:
    """`traits` with only this form of content for roles that accept it, and "" for no content."""
    known = {"user": (form,), **traits.content_forms}
    forms = {role: (form,) if form in usable else usable for role, usable in known.items()}
    return replace(traits, content_forms=forms, absent="empty", absent_with_calls="empty")


def _check_message(message: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One message without its null fields; its content is a text, a list of texts or None."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"{name} must be an object with a role", "messages")
    checked = {key: value for key, value in message.items() if value is not None}
    checked["content"] = _check_content(message.get("content"), f"{name}.content")
    calls = checked.pop("tool_calls", None)
    if calls:  # left out if empty: templates test whether it is defined
        checked["tool_calls"] = _check_tool_calls(calls, f"{name}.tool_calls")
    reasoning = next((checked[key] for key in REASONING if key in checked), None)
    if reasoning is not None:
        checked |= dict.fromkeys(REASONING, reasoning)
    return checked


def _check_content(content: Any, name: str) -> str | list[str] | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{name} must be a string or a list of parts", name)
    return [_part_text(part, f"{name}[{i}]") for i, part in enumerate(content)]


def _prepare(checked: list[dict[str, Any]], traits: Traits) -> list[Any]:
    return [_prepare_message(message, traits) for message in checked]


def _prepare_message(message: Mapping[str, Any], traits: Traits) -> dict[str, Any]:
    """A message from _check_message in the form that the template expects."""
    prepared = {**message, "role": known_role(message["role"], traits)}
    if "tool_calls" in message:
        prepared["tool_calls"] = [_prepare_call(call, traits) for call in message["tool_calls"]]
    content = message["content"]
    absent: Absent = "empty"
    if content is None and message["role"] == "assistant":
        absent = traits.absent_with_calls if "tool_calls" in message else traits.absent
    if absent == "missing":
        del prepared["content"]
    elif absent != "null":
        prepared["content"] = _in_form(content, traits.forms(prepared["role"]))
    if traits.reasoning == "part" and message.get(REASONING[0]):
        parts = _in_form(content, ("parts",)) if content else []
        prepared["content"] = [thinking_part(message[REASONING[0]]), *parts]
    return prepared


def known_role(role: str, traits: Traits) -> str:
    return "system" if role == "developer" and not traits.has_developer else role


def _in_form(content: str | list[str] | None, forms: Sequence[Form]) -> str | list[Any]:
    """Content as text or as parts: in the form it came in, if the template accepts that form."""
    given: Form = "parts" if isinstance(content, list) else "text"
    texts = content if isinstance(content, list) else [] if content is None else [content]
    if (given if given in forms else forms[0]) == "text":
        return "\n".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _part_text(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise InvalidRequestError(f"{name} must be a string or an object with a type", name)
    if kind not in PART_TYPES:
        raise NotBuiltError(
            f"{name}.type: parts of type {kind[:40]} are not built yet, "
            f"only {' and '.join(PART_TYPES)}",
            f"{name}.type",
        )
    text = part.get(kind)
    if not isinstance(text, str):
        raise InvalidRequestError(f"{name}.{kind} must be a string", f"{name}.{kind}")
    return text


@dataclass(frozen=True, slots=True)
class _Arguments:
    """The arguments of a tool call, as an object and as text."""

    value: Mapping[str, Any]
    text: str  # the same as JSON


def _check_tool_calls(calls: Any, name: str) -> list[Any]:
    """The calls, with their arguments, which may be JSON text or an object, kept in both forms."""
    if not isinstance(calls, list):
        raise InvalidRequestError(f"{name} must be a list", "messages")
    checked = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidRequestError(f"{name}[{i}] must have a function", "messages")
        given = function.get("arguments")
        arguments = given
        if isinstance(given, str):
            arguments = _parse_arguments(given, f"{name}[{i}].function.arguments")
        if arguments is not None and not isinstance(arguments, Mapping):
            raise InvalidRequestError(
                f"{name}[{i}].function.arguments must be a JSON object", "messages"
            )
        text = given
        if not text or not isinstance(text, str):  # as the template filter `tojson` writes it
            text = json.dumps(arguments or {}, ensure_ascii=False)
        arguments = _Arguments(arguments or {}, text)
        checked.append({**call, "function": {**function, "arguments": arguments}})
    return checked


def _prepare_call(call: Mapping[str, Any], traits: Traits) -> dict[str, Any]:
    arguments: _Arguments = call["function"]["arguments"]
    value = arguments.text if traits.has_text_arguments else arguments.value
    return {**call, "function": {**call["function"], "arguments": value}}


def _parse_arguments(text: str, name: str) -> Any:
    if not text.strip():
        return {}
    try:
        return any_json.decode(text)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequestError(f"{name} is not JSON: {error}", "messages") from error
