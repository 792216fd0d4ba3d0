"""How a model writes tool calls when a grammar holds it to a format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyserve.text.tool_parsers.arguments import Form, written_arguments

NAME = "NAME"  # placeholder for the function's name


@dataclass(frozen=True, slots=True)
class Written:
    """One way to write calls, exact except for names and arguments.

    call     text before and after the arguments of one call; the first has NAME for the name.
    around   text before and after all calls of an answer.
    between  text between two calls.
    trigger  text by which a grammar recognises calls among other text. It begins the whole, or a
             call of it, maybe after markup. "" if there is none.
    bare     without a trigger: the character that calls begin with, at the start of an answer.
             Other text may not begin with it.
    form     how arguments are written.
    """

    call: tuple[str, str]
    around: tuple[str, str] = ("", "")
    between: str = ""
    trigger: str = ""
    bare: str = ""
    form: Form = "json"

    def text(self, calls: Sequence[tuple[str, str]]) -> str:
        """The text of some calls: pairs of a name and its arguments as JSON."""
        begin, end = self.call
        written = [
            begin.replace(NAME, name) + written_arguments(self.form, arguments) + end
            for name, arguments in calls
        ]
        return self.around[0] + self.between.join(written) + self.around[1]
