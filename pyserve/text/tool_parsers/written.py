"""What a model that is held to a format of calls writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyserve.text.tool_parsers.arguments import Form, written_arguments

NAME = "NAME"  # stands where that of the function does


@dataclass(frozen=True, slots=True)
class Written:
    """One form, to the letter but for names and arguments.

    call     around the arguments of one call; the first has `NAME` where the name stands.
    around   all calls of an answer.
    between  two calls.
    trigger  by which a call is told from other text: the beginning of all that, or of what stands
             in it behind markup; "": there is none.
    bare     the character that all that begins with at the start of an answer, and other text not.
    form     of the arguments.
    """

    call: tuple[str, str]
    around: tuple[str, str] = ("", "")
    between: str = ""
    trigger: str = ""
    bare: str = ""
    form: Form = "json"

    def text(self, calls: Sequence[tuple[str, str]]) -> str:
        """What is written for calls: pairs of a name and its arguments as JSON."""
        begin, end = self.call
        written = [
            begin.replace(NAME, name) + written_arguments(self.form, arguments) + end
            for name, arguments in calls
        ]
        return self.around[0] + self.between.join(written) + self.around[1]
