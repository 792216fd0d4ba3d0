"""Structured outputs: request fields -> one spec -> compiled grammar -> a constraint per answer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from pyserve import any_json
from pyserve.api.endpoints.body import SHORT_BODY_BYTES
from pyserve.api.http.uploads import NUM_BODY_BYTES
from pyserve.api.state import Loaded, ServerState
from pyserve.api.wire.protocol import ResponseFormat, SamplingFields, StructuredOutputs
from pyserve.client import Constraint
from pyserve.constraints import unconstrained
from pyserve.errors import InvalidRequestError
from pyserve.text.grammar import (
    MAX_SPEC_BYTES,
    Choice,
    Compiled,
    Grammar,
    JsonSchema,
    Regex,
    Spec,
    Tags,
)
from pyserve.text.grammar_constraint import FreeUntil
from pyserve.text.grammar_json import whitespace_of

RESPONSE_FORMATS = ("text", "json_object", "json_schema", "structural_tag")
# Field of response_format -> the only value of its `type` that allows the field.
_TYPE_OF = {
    "json_schema": "json_schema", "schema": "json_object", "format": "structural_tag",
    "structures": "structural_tag", "triggers": "structural_tag",
}  # fmt: skip
ANY_OBJECT = {"type": "object"}
OF_WHITE_SPACE = "guided_whitespace_pattern"


async def read_constraint(
    request: web.Request,
    state: ServerState,
    loaded: Loaded,
    body: SamplingFields,
    *,
    ignored: list[str],
    free_until: FreeUntil | None = None,
) -> Callable[[], Constraint | None]:
    """Read the fields and return what makes the constraint of each answer; see Job.make_constraint.

    ignored     collects the names of fields that have no effect.
    free_until  the unconstrained part before the structured one, such as reasoning; None: none.

    A grammar that is not cached is compiled on a worker thread, when it is the client's turn.

    Raises InvalidRequestError naming the field, QueueFullError, UnavailableError.
    """
    spec = read_spec(body, ignored)
    if spec is None:
        return unconstrained
    n = max(body.n or 1, body.best_of or 1)
    compiled = await compile_spec(request, state, loaded, spec, n=n)
    compiled.check_pace(spec.param, n=n)
    return partial(compiled.constraint, free_until=free_until)


async def compile_spec(
    request: web.Request, state: ServerState, loaded: Loaded, spec: Spec, *, n: int = 1
) -> Compiled:
    """Compile `spec` for n answers at once, or take it from the cache.

    The spec is looked up on the event loop only if the body is short: computing the key of a large
    one would block the loop. Raises as `read_constraint`.
    """
    num_bytes = request[NUM_BODY_BYTES]
    compiled = loaded.grammars.get(spec, n=n) if num_bytes <= SHORT_BODY_BYTES else None
    if compiled is None:
        compile = partial(loaded.grammars.compile, spec, n=n)
        compiled = await state.run_text(request, num_bytes, compile, short=0)
    return compiled


def read_spec(body: SamplingFields, ignored: list[str]) -> Spec | None:
    """The structured output that the request asks for; None if it asks for none.

    ignored  collects the names of fields that have no effect.

    Raises InvalidRequestError naming the field, also if the request asks for two.
    """
    specs = [
        *_of_response_format(body.response_format),
        *_of_structured(body.structured_outputs, ignored),
    ]
    specs += _of_guided(body)
    if len(specs) > 1:
        first, second = specs[0].param, specs[1].param
        raise InvalidRequestError(
            f"{first} and {second} both ask for a structured output: leave one of them out", second
        )
    if body.guided_whitespace_pattern is not None and body.guided_json is None:
        ignored.append(OF_WHITE_SPACE)
    return specs[0] if specs else None


def _of_response_format(format_: ResponseFormat | None) -> list[Spec]:
    name = "response_format"
    if format_ is None:
        return []
    for field, type_ in _TYPE_OF.items():
        if getattr(format_, field) is not None and format_.type != type_:
            raise InvalidRequestError(
                f"{name}.{field} goes with the type {type_}, got {format_.type[:60]}: leave one of "
                "them out",
                f"{name}.{field}",
            )
    if format_.type == "text":
        return []
    if format_.type == "json_object":
        if format_.schema is not None:  # an extension of llama.cpp, Together and others
            return [JsonSchema(param=f"{name}.schema", schema=format_.schema)]
        return [JsonSchema(param=name, schema=ANY_OBJECT)]
    if format_.type == "json_schema":
        inner = format_.json_schema
        if inner is None or inner.schema is None:
            missing = f"{name}.json_schema" + ("" if inner is None else ".schema")
            raise InvalidRequestError(f"{missing} is missing", missing)
        return [JsonSchema(param=f"{name}.json_schema.schema", schema=inner.schema)]
    if format_.type == "structural_tag":
        if format_.format is not None:
            if format_.structures is not None or format_.triggers is not None:
                raise InvalidRequestError(
                    f"{name}.format and {name}.structures both say what the answer is: leave one "
                    "of them out",
                    f"{name}.format",
                )
            return [Tags(param=f"{name}.format", tags=format_.format)]
        if format_.structures is None:
            raise InvalidRequestError(f"{name}.format is missing", f"{name}.format")
        tags = {"structures": format_.structures, "triggers": format_.triggers}
        return [Tags(param=name, tags=tags)]
    raise InvalidRequestError(
        f"{name}.type must be one of {', '.join(RESPONSE_FORMATS)}, got {format_.type[:60]}",
        f"{name}.type",
    )


def _of_structured(asked: StructuredOutputs | None, ignored: list[str]) -> list[Spec]:
    if asked is None:
        return []
    name = "structured_outputs"
    white = None
    if asked.whitespace_pattern is not None:
        white = whitespace_of(asked.whitespace_pattern, param=f"{name}.whitespace_pattern")
    if asked.disable_any_whitespace:
        white = ""
    has_others = not asked.disable_additional_properties
    specs: list[Spec] = []
    if asked.json is not None:
        param = f"{name}.json"
        schema = _schema(asked.json, param)
        specs.append(
            JsonSchema(
                param=param, schema=schema, whitespace=white, has_additional_properties=has_others
            )
        )
    if asked.json_object:
        specs.append(JsonSchema(param=f"{name}.json_object", schema=ANY_OBJECT, whitespace=white))
    specs += _texts(name + ".", asked.regex, asked.choice, asked.grammar)
    if asked.structural_tag is not None:
        param = f"{name}.structural_tag"
        tags = _json(asked.structural_tag, param)
        if not isinstance(tags, dict):
            raise InvalidRequestError(f"{param} must be an object", param)
        specs.append(Tags(param=param, tags=tags, whitespace=white))
    if not specs:
        raise InvalidRequestError(
            f"{name} must have one of json, json_object, regex, choice, grammar and structural_tag",
            name,
        )
    is_json = not isinstance(specs[0], Regex | Choice | Grammar)
    without_effect = {
        "whitespace_pattern": asked.whitespace_pattern is not None
        and (not is_json or bool(asked.disable_any_whitespace)),
        "disable_any_whitespace": bool(asked.disable_any_whitespace) and not is_json,
        "disable_additional_properties": not has_others and asked.json is None,
    }
    ignored += [f"{name}.{field}" for field, is_so in without_effect.items() if is_so]
    return specs


def _of_guided(body: SamplingFields) -> list[Spec]:
    specs: list[Spec] = []
    if body.guided_json is not None:
        white = None
        if body.guided_whitespace_pattern is not None:
            white = whitespace_of(body.guided_whitespace_pattern, param=OF_WHITE_SPACE)
        schema = _schema(body.guided_json, "guided_json")
        specs.append(JsonSchema(param="guided_json", schema=schema, whitespace=white))
    return specs + _texts("guided_", body.guided_regex, body.guided_choice, body.guided_grammar)


def _texts(
    prefix: str, regex: str | None, choice: list[str] | None, grammar: str | None
) -> list[Spec]:
    specs: list[Spec] = []
    if regex is not None:
        specs.append(Regex(param=f"{prefix}regex", pattern=_not_empty(regex, f"{prefix}regex")))
    if choice is not None:
        specs.append(Choice(param=f"{prefix}choice", texts=choice))
    if grammar is not None:
        specs.append(Grammar(param=f"{prefix}grammar", text=grammar))
    return specs


def _not_empty(text: str, param: str) -> str:
    if not text:
        raise InvalidRequestError(f"{param} must not be empty", param)
    return text


def _schema(given: object, param: str) -> Any:
    """A JSON schema that clients may send as JSON or as a string of JSON text."""
    return _json(given, param) if isinstance(given, str) else given


def _json(text: object, param: str) -> Any:
    """A string of JSON text, decoded; any other value unchanged. Raises InvalidRequestError."""
    if not isinstance(text, str):
        return text
    if len(text) > MAX_SPEC_BYTES:
        raise InvalidRequestError(
            f"{param} has {len(text)} characters, the limit is {MAX_SPEC_BYTES}", param
        )
    try:
        return any_json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        raise InvalidRequestError(f"{param} is not valid JSON", param) from None
