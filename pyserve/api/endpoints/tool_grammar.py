"""Grammars that enforce tool calls: for tool_choice required, a named tool, and strict tools."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from pyserve.api.endpoints.structured import read_spec
from pyserve.api.endpoints.tools import ToolUse
from pyserve.api.http.uploads import NUM_BODY_BYTES
from pyserve.api.state import Loaded, ServerState
from pyserve.api.wire.protocol import ChatRequest
from pyserve.client import Constraint
from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import MAX_SPEC_BYTES, Compiled, Grammars, JsonSchema, Spec, Tags
from pyserve.text.grammar_constraint import FreeUntil
from pyserve.text.grammar_schema import engine_schema
from pyserve.text.tool_parsers.registry import JSON_FORMAT
from pyserve.text.tool_parsers.tags import Tag, may_call, must_call, without_words
from pyserve.text.tool_parsers.written import Written

Schemas = Mapping[str, Mapping[str, Any]]  # name of a tool -> JSON schema of its arguments

MAX_TRIALS_S = 1.0  # time limit for finding out which of several tools cannot be enforced
ANY_ARGUMENTS: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class Held:
    """The compiled grammar of a request's answers.

    trigger  the text that begins a call, if any text is allowed besides calls: no token mask is
             needed before it appears. "": the grammar applies from the start of the answer, or from
             the end of its thinking.
    """

    compiled: Compiled
    trigger: str = ""

    def makes(self, free_until: FreeUntil | None) -> Callable[[], Constraint]:
        """Return what makes the constraint of each answer.

        free_until  the thinking before an answer; None: there is none. If it is not certain that
                    the answer thinks, a trigger inside the thinking is taken as a call's beginning.
        """
        if self.trigger and free_until is None:
            free_until = FreeUntil(ends=(), next_ends=(self.trigger,))
        elif self.trigger and free_until is not None and free_until.starts:
            next_ends = (self.trigger, *free_until.next_ends)
            free_until = FreeUntil(free_until.ends, next_ends)
        return partial(self.compiled.constraint, free_until=free_until)


async def hold_to_tools(
    request: web.Request, state: ServerState, loaded: Loaded, body: ChatRequest, use: ToolUse
) -> tuple[ToolUse, Held | None]:
    """Make the grammar that enforces the tool calls of `body`.

    Returns the tools, without those that cannot be enforced, and the grammar. The grammar is None
    if tools need none; otherwise it also covers the structured output that the request asks for.

    A tool whose schema cannot be enforced is also left out of the prompt and named as ignored. If
    no tool is left, the request is refused.

    Raises InvalidRequestError naming the field, QueueFullError, UnavailableError.
    """
    is_forced = use.mode == "required"
    form = read_spec(body, []) if use.mode != "none" else None
    if is_forced and form is not None:
        raise InvalidRequestError(
            f"tool_choice and {form.param} both say what the answer is: leave one of them out",
            "tool_choice",
        )
    use = await in_words(request, state, use)
    written = use.format.written if use.format is not None else None
    if form is not None and not _may_be_beside_calls(form, written):
        # Every answer has that structured form, so none can be a call: the tools have no effect.
        return replace(use, ignored=[*use.ignored, "tools"]), None
    if not is_forced and form is None and not use.strict:
        return use, None
    assert written is not None
    is_triggered = not is_forced and form is None

    def make_tags(schemas: Schemas) -> Tag:
        is_single = use.max_calls == 1
        if is_forced:
            return must_call(written, schemas, is_single=is_single)
        if isinstance(form, JsonSchema):
            calls = must_call(written, schemas, is_single=is_single)
            schema = {"type": "json_schema", "json_schema": form.schema}
            return {"type": "or", "elements": [calls, schema]}
        return may_call(written, schemas, is_single=is_single)

    schemas = {
        name: schema if is_forced or name in use.strict else ANY_ARGUMENTS
        for name, schema in use.parameters.items()
        if use.name in ("", name)
    }
    compile_all = partial(_compile, loaded.grammars, make_tags, schemas, use.places)
    size = request[NUM_BODY_BYTES]
    compiled, refused = await state.run_text(request, size, compile_all, short=0)
    compiled.check_pace("tools", n=max(body.n or 1, body.best_of or 1))
    kept = [tool for tool in use.shown if tool["function"]["name"] not in refused]
    ignored = [*use.ignored, *(f"tools.{name}" for name in refused)]
    trigger = written.trigger if is_triggered else None
    use = replace(use, shown=kept, ignored=ignored, trigger=trigger)
    return use, Held(compiled, trigger or "")


async def in_words(request: web.Request, state: ServerState, use: ToolUse) -> ToolUse:
    """Choose the call format for which a grammar can express the schemas to be enforced.

    If calls are required and the model's own format cannot express the schema of one of the tools,
    all calls are plain JSON instead. If calls are optional, a strict tool whose schema the format
    cannot express may be called with any arguments, and its `strict` is named as ignored.

    Raises InvalidRequestError naming the field, QueueFullError, UnavailableError.
    """
    is_forced = use.mode == "required"
    format = use.format or JSON_FORMAT
    names = use.strict
    if is_forced:
        use = replace(use, format=format)
        names = frozenset([use.name] if use.name else use.parameters)
    held = {name: schema for name, schema in use.parameters.items() if name in names}
    if format.written.form == "json" or not held:
        return use

    def look() -> frozenset[str]:
        _check_bytes(held)
        return frozenset(without_words(format.written, held))

    unsaid = await state.run_text(request, request[NUM_BODY_BYTES], look, short=0)
    if is_forced:
        return replace(use, format=JSON_FORMAT) if unsaid else use
    ignored = [*use.ignored, *(f"tools.{name}.strict" for name in use.parameters if name in unsaid)]
    return replace(use, strict=use.strict - unsaid, ignored=ignored)


def _may_be_beside_calls(form: Spec, written: Written | None) -> bool:
    """Whether one grammar can express "either tool calls or the structured output `form`"."""
    if written is None or not isinstance(form, JsonSchema):
        return False
    return form.has_additional_properties and form.whitespace is None


def _check_bytes(schemas: Schemas) -> None:
    """Refuse schemas that are too large together, before any work is done for each of them."""
    num_bytes = len(msgspec.json.encode(schemas))
    if num_bytes > MAX_SPEC_BYTES:
        raise InvalidRequestError(
            f"tools: the parameters to be enforced take {num_bytes} bytes, the limit is "
            f"{MAX_SPEC_BYTES}",
            "tools",
        )


def _compile(
    grammars: Grammars,
    make_tags: Callable[[Schemas], Tag],
    schemas: Schemas,
    places: Mapping[str, int],
) -> tuple[Compiled, list[str]]:
    """Compile the grammar of all tools that can be enforced; returns the names of the others too.

    places  name of a tool -> its index in the request, for all tools.

    Raises InvalidRequestError if no tool can be enforced, if finding out takes too long, or if the
    tools compile one by one but not together.
    """
    _check_bytes(schemas)
    fields = {name: f"tools[{places[name]}].function.parameters" for name in schemas}
    refused: dict[str, InvalidRequestError] = {}

    def try_each(
        trial: Callable[[str], object], late: InvalidRequestError
    ) -> dict[str, Mapping[str, Any]]:
        """The schemas for which `trial` does not raise; the others are added to `refused`.

        Raises `late` if that takes longer than MAX_TRIALS_S, and the first refusal if none passes.
        """
        began_s = time.monotonic()
        for name in [name for name in schemas if name not in refused]:
            try:
                trial(name)
            except InvalidRequestError as error:
                refused[name] = InvalidRequestError(
                    f"the tool {name}: {error.message}", fields[name]
                )
            if time.monotonic() - began_s > MAX_TRIALS_S:
                raise late
        if len(refused) == len(schemas):
            raise next(refused[name] for name in places if name in refused)
        return {name: schema for name, schema in schemas.items() if name not in refused}

    def compile_one(name: str) -> None:
        grammars.compile(Tags(param=fields[name], tags=make_tags({name: schemas[name]})))

    late = InvalidRequestError("tools take too long to compile", "tools")
    kept = try_each(lambda name: engine_schema(schemas[name], param=fields[name]), late)
    began_s = time.monotonic()
    try:
        compiled = grammars.compile(Tags(param="tools", tags=make_tags(kept)))
    except InvalidRequestError as error:
        if time.monotonic() - began_s > MAX_TRIALS_S:
            raise
        fewer = try_each(compile_one, error)
        if len(fewer) == len(kept):
            raise  # each tool compiles alone: they are only too much together
        compiled = grammars.compile(Tags(param="tools", tags=make_tags(fewer)))
    return compiled, [name for name in places if name in refused]
