"""What every script here uses: the server's place, the questions of the guide, one line a check.

Runs in the environment of each client library: nothing but the standard library is imported.
"""

import asyncio
import inspect
import json
import os
import sys
import traceback

BASE_URL = os.environ["PYSERVE_CLIENT_URL"] + "/v1"
MODEL = os.environ["PYSERVE_CLIENT_MODEL"]
API_KEY = "not-needed"
CAPITAL = "What is the capital of France?"
WEATHER = "What is the weather in Paris?"
PERSON = "Extract: John Smith, 30 years old, software engineer"
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}


def is_paris(text):
    assert "Paris" in text, f"no Paris in {text!r}"


def is_john(name, age):
    assert (name, age) == ("John Smith", 30), f"got {name!r}, {age!r}"


def main(*functions):
    """Call each; print a JSON line with its name and its error, null where there is none."""
    for function in functions:
        error = None
        try:
            result = function()
            if inspect.isawaitable(result):
                asyncio.run(_wait(result))
        except Exception as problem:
            traceback.print_exc()
            error = f"{type(problem).__name__}: {problem}"[:500]
        print("CHECK " + json.dumps({"name": function.__name__, "error": error}), flush=True)
    sys.stdout.flush()


async def _wait(result):
    return await result
