"""Client libraries of others, each in an environment of its own, against the demo model.

    python -m pytest -m network tests/clients -s
    python -m pytest -m network tests/clients -s -k langchain

Environments are made below PYSERVE_CLIENTS, a folder that is kept, or in a folder of the test's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.server_process import ServerProcess, running_server
from tests.clients.agents import AGENTS

SCRIPTS = Path(__file__).parent / "scripts"
MODEL = "pyserve-demo"
FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
# The demo model in a reranker's place: its scores mean nothing, and are numbers between 0 and 1.
PAIRS = (
    "{% for m in messages %}{{ {'query': 'Q:', 'document': 'D:'}[m.role] + m.content }}{% endfor %}"
)
AS_RERANKER = ("--runner", "score", "--chat-template", PAIRS)
INSTALL_TIMEOUT_S, SCRIPT_TIMEOUT_S = 900, 300


@dataclass(frozen=True, slots=True)
class Client:
    """A script of `scripts`, the packages it needs (of npm for a .mjs), and its arguments.

    flags  of the server that it asks.
    """

    script: str
    packages: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    flags: tuple[str, ...] = FLAGS

    @property
    def is_npm(self) -> bool:
        return self.script.endswith(".mjs")


CLIENTS = {
    "openai": Client("openai_python.py", ("openai",)),
    "openai-npm": Client("openai_npm.mjs", ("openai", "zod")),
    "anthropic": Client("anthropic_python.py", ("anthropic",)),
    "anthropic-npm": Client("anthropic_npm.mjs", ("@anthropic-ai/sdk",)),
    "openai-npm-responses": Client("openai_npm_responses.mjs", ("openai", "zod")),
    "langchain": Client("langchain_.py", ("langchain-openai",), ("chat",)),
    "langchain-responses": Client("langchain_.py", ("langchain-openai",), ("responses",)),
    "langchain-anthropic": Client("langchain_.py", ("langchain-anthropic",), ("anthropic",)),
    "instructor": Client("instructor_.py", ("instructor",)),
    "litellm": Client("litellm_.py", ("litellm",)),
    "pydantic-ai": Client("pydantic_ai_.py", ("pydantic-ai-slim[openai]",)),
    "openai-agents": Client("openai_agents.py", ("openai-agents",)),
    "openai-agents-responses": Client("openai_agents.py", ("openai-agents",), ("responses",)),
    "cohere": Client("cohere_.py", ("cohere",), flags=AS_RERANKER),
    "lm-eval": Client("lm_eval_.py", ("lm-eval[api]", "transformers")),
    "ai-sdk": Client("ai_sdk.mjs", ("ai", "@ai-sdk/openai-compatible", "zod"), ("compatible",)),
    "ai-sdk-anthropic": Client("ai_sdk.mjs", ("ai", "@ai-sdk/anthropic", "zod"), ("anthropic",)),
    "ai-sdk-openai": Client("ai_sdk.mjs", ("ai", "@ai-sdk/openai", "zod"), ("openai",)),
}


def prepare(client: Client, folder: Path) -> list[str]:
    """Make the environment in `folder` where it is not there; the command that runs the script."""
    mark = folder / "done"
    if client.is_npm:
        program = shutil.which("node")
        if program is None or shutil.which("npm") is None:
            pytest.skip("there is no node with npm")
        command = [program, str(folder / client.script)]
        steps = [["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder)]]
    else:
        python = folder / "bin" / "python"
        command = [str(python), str(SCRIPTS / client.script)]
        steps = [
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet"],
        ]
    if not mark.is_file():
        steps[-1] += client.packages
        folder.mkdir(parents=True, exist_ok=True)
        for step in steps:
            subprocess.run(step, check=True, timeout=INSTALL_TIMEOUT_S)
        mark.touch()
    if client.is_npm:  # packages are looked for beside the script
        for name in ("checks.mjs", client.script):
            shutil.copy(SCRIPTS / name, folder / name)
    return [*command, *client.arguments]


def run_script(command: Sequence[str], url: str, **more: str) -> dict[str, str | None]:
    """Check -> its error, None where there is none. AssertionError where the script fails."""
    # Nothing of this environment: neither our packages nor somebody's key or proxy.
    kept = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG", "TMPDIR")}
    environment = {**kept, "PYSERVE_CLIENT_URL": url, "PYSERVE_CLIENT_MODEL": MODEL, **more}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=SCRIPT_TIMEOUT_S
    )
    print(done.stdout, done.stderr[-5000:], sep="\n")
    lines = [line for line in done.stdout.splitlines() if line.startswith("CHECK ")]
    checks = [json.loads(line.removeprefix("CHECK ")) for line in lines]
    assert done.returncode == 0 and checks, done.stderr[-2000:]
    return {check["name"]: check["error"] for check in checks}


@contextmanager
def serving(flags: Sequence[str]) -> Iterator[ServerProcess]:
    with running_server(["--dtype", "float32", "--device", "cpu", *flags]) as running:
        running.wait_ready(240)
        yield running


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving(FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("PYSERVE_CLIENTS")
    return Path(kept) if kept else tmp_path_factory.mktemp("clients")


@pytest.mark.network
@pytest.mark.timeout(INSTALL_TIMEOUT_S + SCRIPT_TIMEOUT_S)
@pytest.mark.parametrize("name", CLIENTS)
def test_client(name: str, request: pytest.FixtureRequest, environments: Path) -> None:
    client = CLIENTS[name]
    command = prepare(client, environments / name)
    if client.flags == FLAGS:
        errors = run_script(command, request.getfixturevalue("server").url)
    else:
        with serving(client.flags) as running:
            errors = run_script(command, running.url)
    assert not {check: error for check, error in errors.items() if error}


@pytest.mark.network
@pytest.mark.timeout(INSTALL_TIMEOUT_S + SCRIPT_TIMEOUT_S)
@pytest.mark.parametrize("name", AGENTS)
def test_agent(name: str, environments: Path) -> None:
    """In a network of its own, as agents speak to their makers' servers too."""
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    folder = environments / name
    prepare(Client("checks.mjs", (AGENTS[name].package,)), folder)
    program = [sys.executable, "-m", "tests.clients.agents", name, str(folder)]
    cache = {k: v for k, v in os.environ.items() if k == "PYSERVE_CACHE"}
    errors = run_script(["unshare", "-rn", *program], "", **cache)
    assert not {check: error for check, error in errors.items() if error}


def test_a_failed_check_and_a_failed_script_are_seen() -> None:
    good = "import sys; sys.path.insert(0, sys.argv[1]); from checks import main\n"
    good += "def a(): pass\nasync def b(): assert 0, 'x'\nmain(a, b)"
    found = run_script([sys.executable, "-c", good, str(SCRIPTS)], "http://127.0.0.1:1")
    assert found == {"a": None, "b": "AssertionError: x"}
    for program in ("print('nothing')", "print('CHECK {}'); raise SystemExit(1)"):
        with pytest.raises((AssertionError, KeyError)):
            run_script([sys.executable, "-c", program], "http://127.0.0.1:1")


def test_every_script_has_its_client() -> None:
    scripts = {path.name for path in SCRIPTS.iterdir() if path.suffix in (".py", ".mjs")}
    assert scripts == {client.script for client in CLIENTS.values()} | {"checks.py", "checks.mjs"}
