"""A chat template's source -> a compiled template in a sandbox, and what its syntax tree tells.

A template comes with the model, so it is code of strangers: it runs in jinja2's immutable sandbox,
with the filters and globals that Hugging Face's environment offers and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from pyserve.errors import CheckpointError

ContentFormat = Literal["string", "openai"]


class TemplateRefusal(jinja2.TemplateError):
    """Raised by a template's own call of raise_exception; its message is for the client."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What a template expects of messages, read from its syntax tree.

    content_format      "openai": it loops over the parts of a message's content.
    tests_string        it also tests whether content is a string.
    tests_none          it tests whether content is none.
    arguments_as_text   it concatenates a tool call's arguments, so they must be a string.
    knows_developer     it mentions the role developer.
    """

    content_format: ContentFormat
    tests_string: bool
    tests_none: bool
    arguments_as_text: bool
    knows_developer: bool


def compile_template(source: str, name: str) -> tuple[jinja2.Template, Traits]:
    """`name` says in errors where the source is from. Raises CheckpointError on bad syntax."""
    environment = _environment()
    try:
        tree = environment.parse(source)
        return environment.from_string(source), _read_traits(tree, source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"{name}: not a valid chat template: {error.message} (line {error.lineno})"
        ) from error
    except RecursionError as error:
        raise CheckpointError(f"{name}: the chat template is nested too deeply") from error


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.filters["tojson"] = _tojson
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's, of limited length
        "cycler": environment.globals["cycler"],
        "joiner": environment.globals["joiner"],
        "dict": _make_dict,
        "namespace": _SafeNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    return environment


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %} marks assistant text for training; here just text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _SafeNamespace(Namespace):
    """Jinja's namespace without names that Python itself reads, such as __class__."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805  (self may be a keyword)
        for name in dict(*args[1:], **kwargs):
            _refuse_underscore(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError("a namespace holds no names that start with _")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
        sort_keys=sort_keys,
    )  # fmt: skip


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _read_traits(tree: nodes.Template, source: str) -> Traits:
    is_content = _content_test(tree)
    loops = any(is_content(loop.iter) for loop in tree.find_all(nodes.For))
    tests = [test.name for test in tree.find_all(nodes.Test) if is_content(test.node)]
    compared_to_none = any(
        is_content(compare.expr)
        and any(isinstance(op.expr, nodes.Const) and op.expr.value is None for op in compare.ops)
        for compare in tree.find_all(nodes.Compare)
    )
    operands: list[nodes.Expr] = []
    for add in tree.find_all(nodes.Add):
        operands += [add.left, add.right]
    for concat in tree.find_all(nodes.Concat):
        operands += concat.nodes
    return Traits(
        content_format="openai" if loops else "string",
        tests_string="string" in tests,
        tests_none="none" in tests or compared_to_none,
        arguments_as_text=any(_accesses(operand, "arguments") for operand in operands),
        knows_developer="developer" in source,
    )


def _content_test(tree: nodes.Template) -> Callable[[nodes.Node], bool]:
    """A test for expressions that are a message's content, under whatever name it goes.

    Names: variables it is assigned to, and parameters of macros it is passed for.
    """
    names: set[str] = set()

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Filter) and node.node is not None:
            return is_content(node.node)
        if isinstance(node, nodes.CondExpr):
            return is_content(node.expr1) or (node.expr2 is not None and is_content(node.expr2))
        if isinstance(node, nodes.Or):
            return is_content(node.left) or is_content(node.right)
        if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            return is_content(node.node)
        if isinstance(node, nodes.Name):
            return node.name in names
        return _accesses(node, "content")

    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    while True:
        found = {
            assign.target.name
            for assign in tree.find_all(nodes.Assign)
            if isinstance(assign.target, nodes.Name) and is_content(assign.node)
        }
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                passed = zip(macro.args, call.args, strict=False)
                found |= {parameter.name for parameter, arg in passed if is_content(arg)}
                found |= {item.key for item in call.kwargs if is_content(item.value)}
        if found <= names:
            return is_content
        names |= found


def _accesses(node: nodes.Node, name: str) -> bool:
    """x.name or x['name']"""
    if isinstance(node, nodes.Getattr):
        return node.attr == name
    return (
        isinstance(node, nodes.Getitem)
        and isinstance(node.arg, nodes.Const)
        and node.arg.value == name
    )
