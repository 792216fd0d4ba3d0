"""Our prompts against transformers', for a folder of chat templates of real models; on demand:

    python -m tests.text.real_templates FOLDER

FOLDER holds *.jinja files. Each is rendered for each of CONVERSATIONS, by us as a client would send
it, and by transformers in each form that a template may want: content as it is, as text or as a
list of parts, arguments as an object or as JSON text, absent content as no key, as none or as "".
The reference is the first of these that shows the most texts and calls as they were written. Prints
every template whose prompts differ, and counts: equal, other (as transformers renders another
form), both refuse, differ, ours alone refuses, theirs alone refuses.
"""

from __future__ import annotations

import argparse
import collections
import copy
import itertools
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from pyserve.errors import PyserveError
from pyserve.text.chat_template import ChatTemplate

SPECIAL_TOKENS = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
}  # fmt: skip
KINDS = ("equal", "other", "both refuse", "differ", "ours refuses", "theirs refuses")
PRINTED_PART = re.compile(r"""['"]text['"]\s*:\s*['"]""").search

Message = dict[str, Any]


def say(role: str, content: Any, **fields: Any) -> Message:
    return {"role": role, "content": content, **fields}


def parts(*texts: str) -> list[Message]:
    return [{"type": "text", "text": text} for text in texts]


def call(name: str, arguments: Any, number: int = 1) -> Message:
    function = {"name": name, "arguments": arguments}
    return {"id": f"abcdefgh{number}", "type": "function", "function": function}


def result(content: Any, number: int = 1, name: str = "get_weather") -> Message:
    return say("tool", content, tool_call_id=f"abcdefgh{number}", name=name)


def tool(name: str, **properties: Any) -> Message:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": name, "description": f"Does {name}: é < 5", "parameters": parameters}
    return {"type": "function", "function": function}


CITY = {"type": "string", "description": "A city"}
UNIT = {"type": "string", "description": "The unit", "enum": ["C", "F"]}
TOOLS = [tool("get_weather", city=CITY), tool("get_time", city=CITY, unit=UNIT)]
SYSTEM, USER = say("system", "Answer shortly."), say("user", "What is up?")
ASSISTANT, THANKS = say("assistant", "The sky."), say("user", "Thanks!")
PARIS, ROME = {"city": "Paris"}, {"city": "Rome", "unit": "C"}
ABSENT: Message = {"role": "assistant", "tool_calls": [call("get_weather", PARIS)]}
NULL = ABSENT | {"content": None}
EMPTY = ABSENT | {"content": ""}
JSON_CALL = say("assistant", "", tool_calls=[call("get_weather", '{"city": "Paris"}')])
TWO_CALLS = say(
    "assistant", None, tool_calls=[call("get_weather", PARIS), call("get_time", ROME, 2)]
)
TWO_RESULTS = [result("20 degrees"), result("noon", 2, "get_time")]
MORE = {"add_generation_prompt": True}
PLAIN = {"add_generation_prompt": False}
CONTINUE = {"add_generation_prompt": False, "continue_final_message": True}
THINKING = "<think>\nHmm, the sky.\n</think>\n\nUp there."

# name -> messages, tools, flags
CONVERSATIONS: dict[str, tuple[list[Message], list[Message] | None, dict[str, Any]]] = {
    "user": ([USER], None, MORE),
    "user, no prompt": ([USER], None, PLAIN),
    "system": ([SYSTEM, USER], None, MORE),
    "system, no prompt": ([SYSTEM, USER], None, PLAIN),
    "turns": ([USER, ASSISTANT, THANKS], None, MORE),
    "system, turns": ([SYSTEM, USER, ASSISTANT, THANKS], None, MORE),
    "assistant last": ([USER, ASSISTANT], None, PLAIN),
    "assistant last, prompt": ([USER, ASSISTANT], None, MORE),
    "continue": ([USER, ASSISTANT], None, CONTINUE),
    "continue, space": ([SYSTEM, USER, say("assistant", "The sky ")], None, CONTINUE),
    "continue, parts": ([USER, say("assistant", parts("The sky"))], None, CONTINUE),
    "non-ASCII": ([say("system", "Sé breve ñ"), say("user", "漢字 😀 𝔘 é\u0301")], None, MORE),
    "spaces": ([say("user", "  in front\n\nand behind \n")], None, MORE),
    "code": ([say("user", "if a < b && c > \"d\":\n    print('{{ x }}')\t# é")], None, MORE),
    "list, one": ([say("user", parts("What is up?"))], None, MORE),
    "list, two": ([say("user", parts("What is up?", "And down?"))], None, MORE),
    "list, system": ([say("system", parts("Answer shortly.")), USER], None, MORE),
    "list, system two": ([say("system", parts("Answer.", "Be short.")), USER], None, MORE),
    "list, all": (
        [say("system", parts("Be short.")), say("user", parts("Hi", "you")),
         say("assistant", parts("Hello.")), say("user", parts("Bye"))], None, MORE),
    "users in a row": ([USER, THANKS], None, MORE),
    "assistants in a row": ([USER, ASSISTANT, say("assistant", "More."), THANKS], None, MORE),
    "late system": ([USER, ASSISTANT, say("system", "Now rhyme."), THANKS], None, MORE),
    "assistant first": ([ASSISTANT, USER], None, MORE),
    "names": ([USER | {"name": "joe"}, ASSISTANT | {"name": "bot"}, THANKS], None, MORE),
    "tools": ([USER], TOOLS, MORE),
    "tools, system": ([SYSTEM, USER], TOOLS, MORE),
    "tools, list": ([say("system", parts("Be short.")), say("user", parts("Hi"))], TOOLS, MORE),
    "call, absent": ([USER, ABSENT, result("20 degrees")], TOOLS, MORE),
    "call, null": ([USER, NULL, result("20 degrees")], TOOLS, MORE),
    "call, empty": ([USER, EMPTY, result("20 degrees")], TOOLS, MORE),
    "call, text": ([SYSTEM, USER, NULL | {"content": "I look."}, result("20")], TOOLS, MORE),
    "call, JSON": ([USER, JSON_CALL, result('{"degrees": 20}')], TOOLS, MORE),
    "call, no tools": ([USER, NULL, result("20 degrees")], None, MORE),
    "call, list result": ([USER, NULL, result(parts("20 degrees"))], TOOLS, MORE),
    "two calls": ([USER, TWO_CALLS, *TWO_RESULTS], TOOLS, MORE),
    "calls, answered": ([USER, TWO_CALLS, *TWO_RESULTS, ASSISTANT, THANKS], TOOLS, MORE),
    "thinking": ([USER, say("assistant", THINKING), THANKS], None, MORE),
}  # fmt: skip
assert len(CONVERSATIONS) == 37


def forms(messages: list[Message]) -> Iterator[list[Message]]:
    """The conversation in each form that a template may want, as it was given first."""
    lists = {m["role"] for m in messages if isinstance(m.get("content"), list)}
    roles = list(dict.fromkeys(m["role"] for m in messages))
    contents = itertools.product(
        *[("given", "text" if role in lists else "parts") for role in roles]
    )
    has_calls = any("tool_calls" in m for m in messages)
    is_absent = any(m.get("content") is None for m in messages)
    arguments = ("object", "text") if has_calls else ("object",)
    absent = ("", None, "''") if is_absent else ("",)
    for choice, as_what, nothing in itertools.product(contents, arguments, absent):
        of_role = dict(zip(roles, choice, strict=True))
        yield [_in_form(m, of_role[m["role"]], as_what, nothing) for m in messages]


def _in_form(message: Message, content: str, arguments: str, absent: str | None) -> Message:
    message = copy.deepcopy(message)
    for item in message.get("tool_calls") or []:
        given = item["function"]["arguments"]
        value = json.loads(given) if isinstance(given, str) else given
        item["function"]["arguments"] = value if arguments == "object" else json.dumps(value)
    given = message.pop("content", None)
    if given is None and absent != "":
        message["content"] = None if absent is None else ""
    elif isinstance(given, list) and content == "text":
        message["content"] = "\n".join(part["text"] for part in given)
    elif isinstance(given, str) and content == "parts":
        message["content"] = parts(given)
    elif given is not None:
        message["content"] = given
    return message


def theirs(source: str, messages: list[Message], tools: Any, flags: dict[str, Any]) -> str:
    rendered, _ = render_jinja_template(
        [messages], tools=tools, chat_template=source, **flags, **SPECIAL_TOKENS
    )
    text: str = rendered[0]
    return text


def references(source: str, name: str) -> tuple[list[str], str]:
    """transformers' prompts in all forms, the best first, and why the first one is refused."""
    messages, tools, flags = CONVERSATIONS[name]
    texts = [text.strip() for message in messages for text in _texts(message)]
    prompts: dict[str, int] = {}
    why = ""
    for form in forms(messages):
        try:
            prompt = theirs(source, form, tools, flags)
        except Exception as error:  # of the template, or of transformers
            why = why or f"{type(error).__name__}: {error}"
            continue
        num_bad = sum(text not in prompt for text in texts)
        num_bad += bool(PRINTED_PART(prompt)) + ("None" in prompt)
        prompts.setdefault(prompt, num_bad)
    return sorted(prompts, key=prompts.__getitem__), why


def _texts(message: Message) -> list[str]:
    content = message.get("content") or ""
    calls = [call["function"]["name"] for call in message.get("tool_calls") or []]
    return calls + ([content] if isinstance(content, str) else [part["text"] for part in content])


def ours(template: ChatTemplate, name: str) -> tuple[str | None, str]:
    """Our prompt, or None and why it was refused."""
    messages, tools, flags = CONVERSATIONS[name]
    try:
        return str(template.render(messages, tools, **flags)), ""
    except PyserveError as error:
        return None, str(error)


def compare(template: ChatTemplate, source: str, name: str) -> tuple[str, str]:
    """One of KINDS, and what there is to say."""
    expected, their_why = references(source, name)
    prompt, our_why = ours(template, name)
    if prompt is None:
        return ("ours refuses", our_why) if expected else ("both refuse", "")
    if not expected:
        return "theirs refuses", their_why
    if prompt == expected[0]:
        return "equal", ""
    start = max(0, len(os.path.commonprefix([prompt, expected[0]])) - 20)
    shown = f"{prompt[start : start + 80]!r}, theirs {expected[0][start : start + 80]!r}"
    return "other" if prompt in expected else "differ", shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("folder", type=Path)
    paths = sorted(parser.parse_args().folder.glob("*.jinja"))
    counts: collections.Counter[str] = collections.Counter()
    for path in paths:
        source = path.read_text(encoding="utf-8")
        template = ChatTemplate(source, special_tokens=SPECIAL_TOKENS)
        for name in CONVERSATIONS:
            kind, why = compare(template, source, name)
            if kind == "differ":  # once more: some templates print the time
                kind, why = compare(template, source, name)
            counts[kind] += 1
            if kind not in ("equal", "both refuse"):
                print(f"{path.stem}: {name}: {kind}: {why}")
    print(f"{len(paths)} templates:", ", ".join(f"{counts[kind]} {kind}" for kind in KINDS))
    return 1 if counts["differ"] + counts["ours refuses"] else 0


if __name__ == "__main__":
    sys.exit(main())
