"""Messages -> prompt, by the chat template that comes with the model.

First, messages from clients are brought into the form that the template expects, which
template_probe.py has found. Then the template renders them in a sandbox. Text from users is kept
apart from the template's control tokens (guard.py).
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.exceptions import TemplateRuntimeError

from pyserve.errors import (
    ChatTemplateError,
    CheckpointError,
    ConfigError,
    InvalidRequestError,
    RequestError,
)
from pyserve.log import get_logger
from pyserve.model_files import guarded, read_text
from pyserve.text.chat_messages import attempts, known_role
from pyserve.text.guard import ChatPrompt, ControlGuard, unused_noncharacters
from pyserve.text.template_limits import MAX_RENDER_S, Meter, TemplateLimitError, metering
from pyserve.text.template_probe import Traits, probe
from pyserve.text.template_source import GLOBALS, TemplateRefusal, compile_template
from pyserve.text.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
MAX_MESSAGE_CHARS = 1000  # length of a template's error message in an answer

_DEFAULT, _TOOL_USE = "default", "tool_use"
_NO_TEMPLATE = (
    "the model has no chat template: use /v1/completions, or start the server with --chat-template"
)
# Put after the mark at the end of a message to be continued. It is white space that `trim` removes
# and that no template writes itself, so it shows whether the template strips messages.
_WIDE_SPACE = "\u3000"
_OWN_NAMES = GLOBALS | {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
    "chat_template",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Compiled:
    template: jinja2.Template
    variables: frozenset[str]
    traits: Traits
    source: str


class ChatTemplate:
    """A model's chat template. Some models have a second one, "tool_use", for requests with tools.

    sources         name of a template -> its jinja source; empty if the model has none.
    special_tokens  variables that templates use, such as bos_token -> their strings.
    control_tokens  strings that only the template may write, not the user.
    origin          where the sources come from, for errors.

    `faults` has the reason for each template that cannot be used; rendering with it raises that
    reason.
    """

    def __init__(
        self,
        sources: Mapping[str, str] | str,
        *,
        special_tokens: Mapping[str, str],
        control_tokens: frozenset[str] = frozenset(),
        origin: str = "chat template",
    ) -> None:
        self._special_tokens = dict(special_tokens)
        self._guard = ControlGuard(control_tokens)
        self._compiled: dict[str, _Compiled] = {}
        self.faults: dict[str, str] = {}
        self._add({_DEFAULT: sources} if isinstance(sources, str) else sources, origin)

    def _add(self, sources: Mapping[str, str], origin: str) -> None:
        for name in sources.keys() & {_DEFAULT, _TOOL_USE}:
            try:
                self._compiled[name] = self._compile(sources[name], origin)
            except CheckpointError as error:
                self.faults[name] = str(error)
        if sources and _DEFAULT not in sources:
            names = ", ".join(sorted(sources))
            self.faults[_DEFAULT] = f"{origin}: no template is named default, only {names}"

    @classmethod
    def load(cls, tokenizer: Tokenizer, *, override: str | None = None) -> ChatTemplate:
        """The template in the tokenizer's folder, or `override`: the path of a file, or jinja
        source.

        Raises ConfigError or CheckpointError if `override` has a fault. A fault of the model's own
        template is only logged, because everything except chats works without a template.
        """
        template = cls(
            {}, special_tokens=tokenizer.special_tokens, control_tokens=tokenizer.control_tokens
        )
        if override is not None:
            return template.with_source(read_override(override), origin="--chat-template")
        try:
            template._add(*_read_sources(tokenizer.folder, tokenizer.config))
        except CheckpointError as error:
            template.faults[_DEFAULT] = str(error).replace(f"{tokenizer.folder}/", "")
        for fault in template.faults.values():
            get_logger().warning(
                "%s: %s: chats are refused; --chat-template gives another", tokenizer.folder, fault
            )
        return template

    def with_source(self, source: str, *, origin: str) -> ChatTemplate:
        """This model with another template. Raises CheckpointError if the source is not a valid
        template.
        """
        other = copy.copy(self)
        other._compiled = {_DEFAULT: self._compile(source, origin)}
        other.faults = {}
        return other

    @property
    def source(self) -> str | None:
        """The source of the default template; None if there is none that can be used."""
        compiled = self._compiled.get(_DEFAULT)
        return None if compiled is None or _DEFAULT in self.faults else compiled.source

    def _compile(self, source: str, origin: str) -> _Compiled:
        with guarded(origin):
            template, variables = compile_template(source, origin)
            return _Compiled(template, variables, probe(template, self._special_tokens), source)

    def reserved(self, names: Iterable[str]) -> frozenset[str]:
        """Those of the names that the keys of `template_kwargs` must not have."""
        return (_OWN_NAMES | self._special_tokens.keys()) & set(names)

    def check_defaults(self, names: Iterable[str]) -> None:
        """Check the names of variables that every chat gets. Raises ConfigError if one is reserved,
        and logs those that no template reads.
        """
        flag = "--default-chat-template-kwargs"
        if reserved := self.reserved(names):
            raise ConfigError(f"{flag} must not hold {min(reserved)}")
        known = {name for each in self._compiled.values() for name in each.variables}
        if unused := sorted(set(names) - known):
            get_logger().warning(
                "%s: the chat template does not look at %s", flag, ", ".join(unused)
            )

    def unused(self, names: Iterable[str], *, has_tools: bool = False) -> list[str]:
        """Those of the names that the template does not read."""
        known = self._choose(has_tools).variables
        return [name for name in names if name not in known]

    def shows_role(self, role: str, *, has_tools: bool = False) -> bool:
        """Whether the template shows messages of `role`, which is system or tool."""
        return role in self._choose(has_tools).traits.content_forms

    def shows_name(self, role: str, *, has_tools: bool = False) -> bool:
        """Whether the template shows the name of a message of this role."""
        traits = self._choose(has_tools).traits
        return known_role(role, traits) in traits.named_roles

    def shows_reasoning(self, *, has_tools: bool = False) -> bool:
        """Whether the template shows the thinking in an assistant's message anywhere."""
        return self._choose(has_tools).traits.reasoning is not None

    def _choose(self, has_tools: bool) -> _Compiled:
        """The template for a request. Raises InvalidRequestError if the model has none, and
        ChatTemplateError if it cannot be used.
        """
        is_special = has_tools and (_TOOL_USE in self._compiled or _TOOL_USE in self.faults)
        name = _TOOL_USE if is_special else _DEFAULT
        if name in self.faults:
            raise ChatTemplateError(
                f"the model's chat template cannot be used: {self.faults[name]}; use "
                "/v1/completions, or start the server with --chat-template"
            )
        if name not in self._compiled:
            raise InvalidRequestError(_NO_TEMPLATE, "messages")
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
        """The prompt of a conversation, for Tokenizer.encode_chat.

        messages, tools, documents and template_kwargs are JSON-like data as clients send it, and
        are not changed. With continue_final_message the prompt ends with the last message's text,
        so that the model continues it.

        Raises InvalidRequestError if a message has the wrong form or the template refuses,
        NotBuiltError for a content part that is not text, and ChatTemplateError if the template
        takes longer than `time_limit_s`, makes too much or cannot be used at all.
        """
        compiled = self._choose(bool(tools))
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other",
                "continue_final_message",
            )
        kwargs = dict(template_kwargs or {})
        if reserved := self.reserved(kwargs):
            raise InvalidRequestError(
                f"chat_template_kwargs must not hold {min(reserved)}", "chat_template_kwargs"
            )
        if documents and "documents" not in compiled.variables:
            raise InvalidRequestError("the chat template does not show documents", "documents")
        began_s = time.monotonic()
        refusal: InvalidRequestError | None = None
        try:
            for prepared, merged in attempts(messages, compiled.traits):
                data = {
                    "messages": prepared,
                    "tools": list(tools) if tools else None,
                    "documents": list(documents) if documents else None,
                    **kwargs,
                }
                try:
                    prompt = self._render(
                        compiled,
                        data,
                        add_generation_prompt=add_generation_prompt,
                        is_continued=continue_final_message,
                        time_limit_s=time_limit_s,
                        began_s=began_s,
                    )
                    prompt.merged = merged
                    return prompt
                except InvalidRequestError as error:
                    refusal = refusal or error
        except RecursionError as error:
            raise InvalidRequestError("messages are nested too deeply", "messages") from error
        assert refusal is not None  # attempts yields at least one form
        raise refusal

    def render_as_given(
        self, messages: Sequence[Mapping[str, str]], *, time_limit_s: float = MAX_RENDER_S
    ) -> ChatPrompt:
        """Like `render`, but for messages with roles that only this template knows: their form and
        order are not changed.
        """
        return self._render(
            self._choose(False),
            {"messages": [dict(message) for message in messages], "tools": None, "documents": None},
            add_generation_prompt=True,
            is_continued=False,
            time_limit_s=time_limit_s,
            began_s=time.monotonic(),
        )

    def _render(
        self,
        compiled: _Compiled,
        data: dict[str, Any],
        *,
        add_generation_prompt: bool,
        is_continued: bool,
        time_limit_s: float,
        began_s: float,
    ) -> ChatPrompt:
        is_guarded = self._guard.concerns(data)
        marks = ""
        if is_guarded or is_continued:
            marks = unused_noncharacters(3, data, source=compiled.source)
        if is_continued:
            _extend_final_text(data["messages"], marks[2] + _WIDE_SPACE)
        if is_guarded:
            data = self._guard.mark(data, marks)
        try:
            meter = Meter(time_limit_s, data=data, began_s=began_s)
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
        if is_continued:
            text = _cut_at(text, marks[2])
        return self._guard.settle(text, marks[:2]) if is_guarded else ChatPrompt(text)


def _extend_final_text(messages: list[Any], mark: str) -> None:
    """Append a mark to the text of the last message. Raises InvalidRequestError if it has no
    content.
    """
    content = messages[-1].get("content")
    if isinstance(content, str):
        messages[-1]["content"] = content + mark
    elif content and "text" in content[-1]:
        content[-1]["text"] += mark
    else:
        raise InvalidRequestError(
            "continue_final_message: the last message has no content", "messages"
        )


def _cut_at(text: str, mark: str) -> str:
    """The text up to the mark, which stands after the last message and before _WIDE_SPACE.

    If that white space is missing, the template has stripped the message, so the text is stripped
    too. Raises InvalidRequestError if there is no mark.
    """
    before, found, after = text.rpartition(mark)
    if not found:
        raise InvalidRequestError(
            "continue_final_message: the chat template does not show the last message's text",
            "continue_final_message",
        )
    return before if after.startswith(_WIDE_SPACE) else before.rstrip()


def _refusal(error: Exception) -> RequestError:
    """The error for a client: with the template's own words, or with Python's about undefined
    values and wrong types. No other message is passed on.
    """
    words = str(error)[:MAX_MESSAGE_CHARS]
    if isinstance(error, TemplateRefusal):
        return InvalidRequestError(words, "messages")
    # The template uses a filter or test that does not exist.
    if type(error) is TemplateRuntimeError:
        return ChatTemplateError(f"the model's chat template cannot be rendered: {words}")
    is_about_values = isinstance(error, (jinja2.UndefinedError, TypeError))
    reason = f": {words}" if is_about_values else ""
    return InvalidRequestError(f"the chat template cannot render messages{reason}", "messages")


def read_override(override: str) -> str:
    """The jinja source that --chat-template names. A value with braces or line breaks is the source
    itself, any other is a path. Raises ConfigError.
    """
    if any(char in override for char in "{}\n"):
        return override
    try:
        text = read_text(Path(override))
    except CheckpointError as error:
        raise ConfigError(f"--chat-template {error}") from error
    if text is None:
        raise ConfigError(f"--chat-template {override}: cannot be read: No such file or directory")
    return text


def _read_sources(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Templates by name, and where they come from: chat_template.jinja, or else chat_template in
    tokenizer_config.json, which is one text or a list of named texts. Raises CheckpointError.
    """
    path = folder / TEMPLATE_FILE
    if os.path.lexists(path):
        files = {_DEFAULT: path}
        extra = folder / "additional_chat_templates"
        files |= {file.stem: file for file in sorted(extra.glob("*.jinja"))}
        texts = {name: read_text(file) for name, file in files.items()}
        return {name: text for name, text in texts.items() if text is not None}, TEMPLATE_FILE
    origin = "tokenizer_config.json: chat_template"
    value = config.get("chat_template")
    if value is None:
        return {}, origin
    if isinstance(value, str):
        return {_DEFAULT: value}, origin
    if isinstance(value, list | dict):  # an object of texts is what a list stands for
        named = list(value.items()) if isinstance(value, dict) else [
            (item.get("name"), item.get("template")) for item in value if isinstance(item, dict)
        ]  # fmt: skip
        if len(named) == len(value) and all(
            isinstance(text, str) for pair in named for text in pair
        ):
            return {str(name): str(text) for name, text in named}, origin
    raise CheckpointError(
        f"{origin} must be text or a list of {{name, template}}, got {value!r:.80}"
    )
