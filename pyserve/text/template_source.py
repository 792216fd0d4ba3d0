"""A chat template's source -> a compiled template in a sandbox.

A template comes with the model, so it is untrusted code. It runs in jinja2's immutable sandbox,
with only the filters and globals that Hugging Face's environment offers. Each of its operations
reports to a Meter (template_limits.py), which stops the template when it exceeds a limit.
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import meta, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from pyserve.errors import CheckpointError
from pyserve.text.template_filters import (
    CONCAT,
    EMIT,
    KEY,
    MADE,
    TAKE,
    TICK,
    make_filters,
    make_tests,
)
from pyserve.text.template_limits import Meter, TemplateLimitError, active, metering

MAX_SOURCE_CHARS = 2**20
MAX_CODE_CHARS = 2**18  # Python compiles so much in 70 ms, with the interpreter's lock held
LOOKUP = 32  # cost of one lookup, towards the next look at the clock
MAX_DATE_FORMAT_CHARS = 1000
GLOBALS = frozenset(
    {"range", "cycler", "joiner", "dict", "namespace", "raise_exception", "strftime_now"}
)


class TemplateRefusal(jinja2.TemplateError):
    """Raised when a template calls raise_exception; its message is meant for the client."""


def compile_template(source: str, name: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The compiled template, and the names of the variables that it reads.

    `name` tells in errors where the source comes from. Raises CheckpointError if the source is too
    large, or not a valid template.
    """
    if len(source) > MAX_SOURCE_CHARS:
        raise CheckpointError(
            f"{name}: the chat template has {len(source)} characters, "
            f"the limit is {MAX_SOURCE_CHARS}"
        )
    environment = _environment()
    try:
        tree = _Instrument().visit(environment.parse(source))
        # find_undeclared_variables evaluates constant expressions. Whatever reports to a Meter
        # fails there, and so does not count as constant: there is no Meter yet.
        variables = frozenset(meta.find_undeclared_variables(tree))
        with metering(Meter()):
            code = environment.compile(tree.set_environment(environment), raw=True)
        if len(code) > MAX_CODE_CHARS:
            raise CheckpointError(
                f"{name}: the chat template makes {len(code)} characters of Python, the limit is "
                f"{MAX_CODE_CHARS}"
            )
        compiled = compile(code, "<template>", "exec")
        return jinja2.Template.from_code(environment, compiled, environment.globals), variables
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"{name}: not a valid chat template: {error.message} (line {error.lineno})"
        ) from error
    except (RecursionError, MemoryError, SyntaxError) as error:  # the last two by Python's compile
        raise CheckpointError(f"{name}: the chat template is nested too deeply") from error
    except (ValueError, TemplateLimitError) as error:  # a constant is too large
        raise CheckpointError(f"{name}: not a valid chat template: {error}") from error


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with every operator, lookup and call measured."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        meter = active()
        meter.check_binop(operator, left, right)
        return meter.made(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        active().tick(LOOKUP)  # filters look up attributes of each item without any other report
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        meter = active()
        checked = meter.check_call(__obj, args, kwargs)
        return meter.made(super().call(__context, __obj, *checked, **kwargs))


class _Instrument(NodeTransformer):
    """Inserts a report to the Meter into each operation that _Environment does not measure."""

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        self.generic_visit(node)
        num_chars = sum(len(c.data) for c in node.nodes if isinstance(c, nodes.TemplateData))
        return [_statement(EMIT, num_chars, node), node] if num_chars else [node]

    def visit_For(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _statement(TICK, 0, node))
        return cast(nodes.Node, node)

    visit_Macro = visit_CallBlock = visit_Block = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(CONCAT, node.nodes[0], node, *node.nodes[1:])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return _filter(TICK, self.generic_visit(node), node)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _filter(MADE, self.generic_visit(node), node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            if not isinstance(pair.key, nodes.Const) or not isinstance(pair.key.value, str):
                pair.key = _filter(KEY, pair.key, pair)
        return _filter(MADE, node, node)

    def visit_Call(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if node.dyn_args is not None:  # Python turns them into a tuple before the call
            node.dyn_args = _filter(TAKE, node.dyn_args, node)
        return cast(nodes.Node, node)

    visit_Filter = visit_Test = visit_Call

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return node if node.ctx != "load" else _filter(MADE, node, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filter(MADE, node, node) if isinstance(node.arg, nodes.Slice) else node


def _statement(name: str, value: int, place: nodes.Node) -> nodes.Node:
    line = place.lineno
    call = _filter(name, nodes.Const(value, lineno=line), place)
    return nodes.ExprStmt(call, lineno=line)


def _filter(name: str, value: nodes.Node, place: nodes.Node, *args: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=place.lineno)


@pass_context  # also keeps jinja from evaluating printed constants when there is no Meter
def _finalize(context: Context, value: Any) -> Any:
    return active().output(value)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        finalize=_finalize,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    environment.filters = make_filters()
    environment.tests.update(make_tests())
    environment.globals = {
        "range": environment.globals["range"],  # the sandbox's own, which limits its length
        "cycler": environment.globals["cycler"],
        "joiner": environment.globals["joiner"],
        "dict": _make_dict,
        "namespace": _SafeNamespace,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
    }
    assert environment.globals.keys() == GLOBALS
    return environment


class _GenerationTag(Extension):
    """{% generation %}...{% endgeneration %} marks text for training; the text is
    printed as it is.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _SafeNamespace(Namespace):
    """Jinja's namespace, but refusing names that Python itself uses, such as __class__."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # noqa: N805  (self may be a keyword)
        for name in _make_dict(*args[1:], **kwargs):
            _refuse_underscore(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # its values change, so they cannot be weighed


def _refuse_underscore(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError("a namespace holds no names that start with _")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*map(active().take_pairs, args), **kwargs)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateRefusal(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > MAX_DATE_FORMAT_CHARS:
        raise SecurityError("strftime_now: the format is too long")
    return datetime.now().strftime(format)
