"""Coding agents of others in print mode, in a network of their own that has loopback alone:

    unshare -rn python -m tests.clients.agents claude-code FOLDER   # or codex

FOLDER has the agent's npm package. The server is the real one but for the model, which is told what
to say: to read a file, by the agent's own tool, and then what is in it. So what the agent prints
shows that a tool was called and its result came back; the tokens that the prefix cache had are
those of the real one. Prints a line CHECK for each, as the scripts do.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyserve.client import SequenceRequest, SequenceStream
from pyserve.config import DEMO_MODEL
from pyserve.engine.async_engine import AsyncEngine
from pyserve.text.chat_template import TEMPLATE_FILE
from pyserve.text.tokenizer import Tokenizer
from tests.api.fakes import MODEL, Server, run_server
from tests.api.instant import make_engine

TIMEOUT_S = 120
CONTEXT, NUM_SLOTS = 2**16, 16
MIN_CACHED = 0.95  # of the first prompt, in the second turn
TAKE_TURNS = (  # as Mistral's templates, which count no calls and no results
    "{% set ns = namespace(i=0) %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('take turns') }}{% endif %}"
    "{% set ns.i = ns.i + 1 %}{% endif %}{% endfor %}"
)
SYSTEM_FIRST = (  # as Qwen's newest
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system first') }}{% endif %}{% endfor %}"
)
BARE = (  # as that of Mistral-7B-Instruct-v0.2: no system, no tools
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('take turns') }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN = (DEMO_MODEL / TEMPLATE_FILE).read_text()
TEMPLATES = {
    "as it is": OWN, "system first": SYSTEM_FIRST + OWN, "turns": SYSTEM_FIRST + TAKE_TURNS + OWN,
    "bare": BARE,
}  # fmt: skip
SECRET = re.compile(r"secret-[0-9a-f]{16}")


@dataclass
class Says:
    """client.Constraint: these tokens, and nothing else."""

    token_ids: Sequence[int]
    num_said: int = 0
    error: str | None = None
    filler = None
    is_free = is_end_void = False

    @property
    def is_finished(self) -> bool:
        return self.num_said >= len(self.token_ids)

    def fill_bitmask(self, words: NDArray[np.int32]) -> None:
        token_id = self.token_ids[min(self.num_said, len(self.token_ids) - 1)]
        words.fill(0)
        words.view("uint32")[token_id // 32] = 1 << token_id % 32

    def accept(self, token_ids: Sequence[int]) -> None:
        self.num_said += len(token_ids)

    def rollback(self, num_tokens: int) -> None:
        self.num_said -= num_tokens


class Told(AsyncEngine):
    """Says what it is told to, and keeps the streams of all requests. `listen` comes first."""

    def listen(self, say: Callable[[str], str], tokenizer: Tokenizer) -> None:
        """say: prompt -> answer."""
        self._say, self._tokenizer = say, tokenizer
        self.streams: list[SequenceStream] = []

    def submit(self, request: SequenceRequest) -> SequenceStream:
        prompt = self._tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
        token_ids = self._tokenizer.encode(self._say(prompt), add_special_tokens=False)
        assert self._tokenizer.eos_token_id is not None
        said = Says([*token_ids, self._tokenizer.eos_token_id])
        self.streams.append(super().submit(replace(request, constraint=said)))
        return self.streams[-1]


@dataclass(frozen=True, slots=True)
class Agent:
    """An npm package and how it is asked.

    read     the call that reads the file at a path: the tool's name, its arguments.
    command  of the folder it is in and the server's address; the question comes behind it.
    """

    package: str
    read: Callable[[Path], tuple[str, dict[str, Any]]]
    command: Callable[[Path, str], list[str]]
    environment: Callable[[str], dict[str, str]]


AGENTS = {
    "claude-code": Agent(
        package="@anthropic-ai/claude-code",
        read=lambda path: ("Read", {"file_path": str(path)}),
        command=lambda folder, url: [
            str(folder / "node_modules/.bin/claude"), "--model", MODEL, "--allowedTools", "Read",
            "--output-format", "json", "-p",
        ],
        environment=lambda url: {
            "ANTHROPIC_BASE_URL": url,
            "ANTHROPIC_API_KEY": "not-needed",
            "ANTHROPIC_SMALL_FAST_MODEL": MODEL,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
        },
    ),
    "codex": Agent(
        package="@openai/codex",
        read=lambda path: ("exec_command", {"cmd": f"cat {path}"}),
        command=lambda folder, url: [
            str(folder / "node_modules/.bin/codex"), "exec", "--skip-git-repo-check",
            "--dangerously-bypass-approvals-and-sandbox", "--model", MODEL,
            "-c", 'model_provider="pyserve"',
            "-c", 'model_providers.pyserve.name="pyserve"',
            "-c", f'model_providers.pyserve.base_url="{url}/v1"',
            "-c", 'model_providers.pyserve.wire_api="responses"',
        ],
        environment=lambda url: {},
    ),
}  # fmt: skip


def ask(
    agent: Agent, folder: Path, home: Path, source: str
) -> tuple[str, str, list[SequenceStream]]:
    """What the agent prints, the secret of the file, and the streams of what it asked for."""
    secret = f"secret-{secrets.token_hex(8)}"
    work = home / "work"
    work.mkdir()
    path = work / "note.txt"
    path.write_text(f"The word is {secret}.\n")
    name, arguments = agent.read(path)
    call = f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"

    def say(prompt: str) -> str:
        found = SECRET.search(prompt)
        if found:
            return f"The word in the file is {found[0]}."
        return call if f'"{name}"' in prompt else "A note"

    tokenizer = Tokenizer.from_folder(DEMO_MODEL)
    engine = make_engine(
        tokenizer.vocab_size, max_model_len=CONTEXT, num_slots=NUM_SLOTS, kind=Told
    )
    engine.listen(say, tokenizer)
    with run_server(
        DEMO_MODEL, other=engine, enable_auto_tool_choice=True, tool_call_parser="hermes"
    ) as server:
        loaded = server.state.loaded
        assert loaded is not None
        template = loaded.chat_template.with_source(source, origin="test")
        server.state.loaded = replace(loaded, chat_template=template)
        done = subprocess.run(
            [*agent.command(folder, _url(server)), "What is the word in note.txt?"],
            env={
                "PATH": os.environ["PATH"], "HOME": str(home), "TERM": "dumb",
                **agent.environment(_url(server)),
            },
            cwd=work, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    print(done.stdout, done.stderr[-4000:], sep="\n")
    return done.stdout, secret, engine.streams


def _url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def check(name: str, folder: Path, template: str) -> dict[str, bool]:
    with tempfile.TemporaryDirectory() as home:
        printed, secret, streams = ask(AGENTS[name], folder, Path(home), TEMPLATES[template])
    prompts = [(stream.num_prompt_tokens, stream.num_cached_tokens) for stream in streams]
    print(f"prompt and cached tokens of each request: {prompts}")
    return {
        f"the result is used, {template}": secret in printed,
        f"the second turn is cached, {template}": len(prompts) > 1
        and prompts[-1][1] >= MIN_CACHED * prompts[-2][0],
    }


def main(name: str, folder: Path) -> int:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=TIMEOUT_S)
    for template in TEMPLATES:
        for what, is_so in check(name, folder, template).items():
            line = {"name": what, "error": None if is_so else "it is not so"}
            print("CHECK " + json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
