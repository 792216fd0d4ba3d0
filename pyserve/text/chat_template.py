"""Messages -> prompt, by the template that comes with the model.

What clients send is brought into the form that the template expects (template_source.Traits), the
template renders it in a sandbox, and what users wrote is kept apart from the template's control
tokens (guard.py).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from pyserve.errors import (
    ChatTemplateError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    NotBuiltError,
)
from pyserve.text.guard import ChatPrompt, ControlGuard, unused_noncharacters
from pyserve.text.template_limits import MAX_RENDER_S, Meter, TemplateLimitError, metering
from pyserve.text.template_source import GLOBALS, TemplateRefusal, Traits, compile_template
from pyserve.text.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
PART_TYPES = ("text", "refusal")  # of message content
MAX_MESSAGE_CHARS = 1000  # of what a template says against a request

_DEFAULT, _TOOL_USE = "default", "tool_use"
_NO_TEMPLATE = (
    "the model has no chat template: use /v1/completions, or start the server with --chat-template"
)
# Behind the mark at the end of a message to be continued: white space that `trim` takes off, and
# that no template writes itself.
_WIDE_SPACE = "\u3000"
_OWN_NAMES = GLOBALS | {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Compiled:
    template: jinja2.Template
    traits: Traits
    source: str


class ChatTemplate:
    """A model's chat template; a model may have a second one, "tool_use", for requests with tools.

    sources         template name -> jinja source; empty where the model has none.
    special_tokens  variables that templates use, such as bos_token.
    control_tokens  strings that only the template may write.

    Raises CheckpointError on a syntax error, naming `origin`.
    """

    def __init__(
        self,
        sources: Mapping[str, str] | str,
        *,
        special_tokens: Mapping[str, str],
        control_tokens: frozenset[str] = frozenset(),
        origin: str = "chat template",
    ) -> None:
        sources = {_DEFAULT: sources} if isinstance(sources, str) else sources
        self._compiled = {
            name: _Compiled(*compile_template(source, origin), source)
            for name, source in sources.items()
        }
        if self._compiled and _DEFAULT not in self._compiled:
            raise CheckpointError(
                f"{origin}: no template is named default, only {', '.join(sorted(sources))}"
            )
        self._special_tokens = dict(special_tokens)
        self._guard = ControlGuard(control_tokens)

    @classmethod
    def load(cls, tokenizer: Tokenizer, *, override: str | None = None) -> ChatTemplate:
        """The template of the tokenizer's folder, or `override`: a file's path or jinja source."""
        if override is not None:
            sources, origin = {_DEFAULT: read_override(override)}, "--chat-template"
        else:
            sources, origin = _read_sources(tokenizer.folder, tokenizer.config)
        return cls(
            sources,
            special_tokens=tokenizer.special_tokens,
            control_tokens=tokenizer.control_tokens,
            origin=origin,
        )

    def with_source(self, source: str, *, origin: str) -> ChatTemplate:
        """The same model with another template. Raises CheckpointError on a syntax error."""
        other = copy.copy(self)
        other._compiled = {_DEFAULT: _Compiled(*compile_template(source, origin), source)}
        return other

    def unused(self, names: Iterable[str], *, has_tools: bool = False) -> list[str]:
        """Those of the names of `template_kwargs` that the template does not look at."""
        if not self._compiled:
            return []
        known = self._choose(has_tools).traits.variables
        return [name for name in names if name not in known]

    @property
    def shows_names(self) -> bool:
        """Whether the template looks at the name of anything."""
        return any(compiled.traits.shows_names for compiled in self._compiled.values())

    def _choose(self, has_tools: bool) -> _Compiled:
        name = _TOOL_USE if has_tools and _TOOL_USE in self._compiled else _DEFAULT
        return self._compiled[name]

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Any] | None = None,
        time_limit_s: float = MAX_RENDER_S,
    ) -> ChatPrompt:
        """The prompt, for Tokenizer.encode_chat.

        messages, tools, documents, template_kwargs: JSON-like data as clients send it; not changed.
        continue_final_message: the prompt ends with the last message's text, to be continued.

        Raises InvalidRequestError where a message has the wrong form or the template refuses,
        NotBuiltError on a content part that is not text, ChatTemplateError where the template
        takes longer than `time_limit_s` or makes too much.
        """
        if not self._compiled:
            raise InvalidRequestError(_NO_TEMPLATE, "messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        kwargs = dict(template_kwargs or {})
        if reserved := (_OWN_NAMES | self._special_tokens.keys()) & kwargs.keys():
            raise InvalidRequestError(
                f"chat_template_kwargs must not hold {min(reserved)}", "chat_template_kwargs"
            )
        compiled = self._choose(bool(tools))
        if documents and "documents" not in compiled.traits.variables:
            raise InvalidRequestError("the chat template does not show documents", "documents")
        try:
            return self._render(
                compiled,
                {
                    "messages": messages,
                    "tools": list(tools) if tools else None,
                    "documents": list(documents) if documents else None,
                    **kwargs,
                },
                add_generation_prompt=add_generation_prompt,
                continues=continue_final_message,
                time_limit_s=time_limit_s,
            )
        except RecursionError as error:
            raise InvalidRequestError("messages are nested too deeply", "messages") from error

    def _render(
        self,
        compiled: _Compiled,
        data: dict[str, Any],
        *,
        add_generation_prompt: bool,
        continues: bool,
        time_limit_s: float,
    ) -> ChatPrompt:
        messages = _prepare_messages(data["messages"], compiled.traits)
        data["messages"] = messages
        is_guarded = self._guard.concerns(data)
        marks = ""
        if is_guarded or continues:
            marks = unused_noncharacters(3, data, source=compiled.source)
        if continues:
            _extend_final_text(messages, marks[2] + _WIDE_SPACE)
        if is_guarded:
            data = self._guard.mark(data, marks)
        try:
            meter = Meter(time_limit_s, data=data)
            with metering(meter):
                text = compiled.template.render(
                    self._special_tokens | data, add_generation_prompt=add_generation_prompt
                )
            meter.require(len(text))
        except TemplateLimitError as error:
            raise ChatTemplateError(
                f"the chat template {error} for these messages", is_timeout=error.is_time
            ) from error
        except (RecursionError, MemoryError) as error:
            raise ChatTemplateError("the chat template recurses too deeply") from error
        except Exception as error:  # a template is code: anything can come out of it
            raise _refusal(error) from error
        if continues:
            text = _cut_at(text, marks[2])
        return self._guard.settle(text, marks[:2]) if is_guarded else ChatPrompt(text)


def _prepare_messages(messages: Sequence[Mapping[str, Any]], traits: Traits) -> list[Any]:
    if not messages:
        raise InvalidRequestError("messages must hold at least one message", "messages")
    return [
        _prepare_message(message, f"messages[{i}]", traits) for i, message in enumerate(messages)
    ]


def _prepare_message(message: Mapping[str, Any], name: str, traits: Traits) -> dict[str, Any]:
    """One message in the form that the template expects. Fields that are null are left out."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"{name} must be an object with a role", "messages")
    prepared = {key: value for key, value in message.items() if value is not None}
    if prepared["role"] == "developer" and not traits.knows_developer:
        prepared["role"] = "system"
    prepared["content"] = _prepare_content(message.get("content"), f"{name}.content", traits)
    if not prepared.get("tool_calls"):
        prepared.pop("tool_calls", None)  # templates ask whether it is defined
    else:
        prepared["tool_calls"] = _prepare_tool_calls(
            prepared["tool_calls"], f"{name}.tool_calls", traits
        )
    reasoning = prepared.get("reasoning_content", prepared.get("reasoning"))
    if reasoning is not None:  # clients use either name, and so do templates
        prepared["reasoning_content"] = prepared["reasoning"] = reasoning
    return prepared


def _prepare_content(content: Any, name: str, traits: Traits) -> str | list[Any] | None:
    """Text, or a list of text parts, or None where the template looks for it."""
    if content is None:
        return None if traits.tests_none else ""
    if isinstance(content, str):
        if traits.content_format == "openai" and not traits.tests_string:
            return [{"type": "text", "text": content}]
        return content
    if not isinstance(content, list):
        raise InvalidRequestError(f"{name} must be a string or a list of parts", name)
    texts = [_part_text(part, f"{name}[{i}]") for i, part in enumerate(content)]
    if traits.content_format == "openai":
        return [{"type": "text", "text": text} for text in texts]
    return "\n".join(texts)


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


def _prepare_tool_calls(calls: Any, name: str, traits: Traits) -> list[Any]:
    """Arguments come as JSON text; templates want the object, but for those that concatenate."""
    if not isinstance(calls, list):
        raise InvalidRequestError(f"{name} must be a list", "messages")
    prepared = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise InvalidRequestError(f"{name}[{i}] must have a function", "messages")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = _parse_arguments(arguments, f"{name}[{i}].function.arguments")
        if arguments is not None and not isinstance(arguments, Mapping):
            raise InvalidRequestError(
                f"{name}[{i}].function.arguments must be a JSON object", "messages"
            )
        arguments = arguments or {}
        if traits.arguments_as_text:
            given = function.get("arguments")
            arguments = given if given and isinstance(given, str) else _to_json(arguments)
        prepared.append({**call, "function": {**function, "arguments": arguments}})
    return prepared


def _parse_arguments(text: str, name: str) -> Any:
    if not text.strip():
        return {}
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidRequestError(f"{name} is not JSON: {error}", "messages") from error


def _to_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _extend_final_text(messages: list[Any], mark: str) -> None:
    """Put a mark behind the text of the last message."""
    content = messages[-1]["content"]
    if isinstance(content, str):
        messages[-1]["content"] = content + mark
    elif content:
        content[-1]["text"] += mark
    else:
        raise InvalidRequestError(
            "continue_final_message: the last message has no content", "messages"
        )


def _cut_at(text: str, mark: str) -> str:
    """The text up to the mark, which stands behind the last message with white space after it.

    Where that is missing, the template strips its messages, and so does this.
    """
    before, found, after = text.rpartition(mark)
    if not found:
        raise InvalidRequestError(
            "continue_final_message: the chat template does not show the last message's text",
            "continue_final_message",
        )
    return before if after.startswith(_WIDE_SPACE) else before.rstrip()


def _refusal(error: Exception) -> InvalidRequestError:
    """The template's own words, or Python's about a value of the wrong kind; no more than that."""
    if isinstance(error, TemplateRefusal):
        return InvalidRequestError(str(error)[:MAX_MESSAGE_CHARS], "messages")
    reason = ""
    if isinstance(error, (jinja2.UndefinedError, TypeError)):
        reason = f": {str(error)[:MAX_MESSAGE_CHARS]}"
    return InvalidRequestError(f"the chat template cannot render messages{reason}", "messages")


def read_override(override: str) -> str:
    """--chat-template: jinja source is told from a path by its braces or line breaks."""
    if any(char in override for char in "{}\n"):
        return override
    try:
        return Path(override).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template {override}: cannot be read: {error}") from error


def _read_sources(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """chat_template.jinja, else chat_template in tokenizer_config.json: text, or named texts."""
    path = folder / TEMPLATE_FILE
    if path.is_file():
        files = {_DEFAULT: path}
        extra = folder / "additional_chat_templates"
        files |= {file.stem: file for file in sorted(extra.glob("*.jinja"))}
        return {name: _read_text(file) for name, file in files.items()}, str(path)
    origin = f"{folder / 'tokenizer_config.json'}: chat_template"
    value = config.get("chat_template")
    if value is None:
        return {}, origin
    if isinstance(value, str):
        return {_DEFAULT: value}, origin
    if isinstance(value, list):
        named = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
        if len(named) == len(value) and all(
            isinstance(text, str) for pair in named.items() for text in pair
        ):
            return {str(name): str(text) for name, text in named.items()}, origin
    raise CheckpointError(f"{origin} must be text or a list of {{name, template}}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
