"""The house rules of the design, held by a test: imports one way, sizes, no torch in the API."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pyserve"
LEAVES = {
    "any_json",
    "config",
    "params",
    "client",
    "constraints",
    "model_files",
    "checkpoint_files",
    "errors",
    "features",
    "metrics",
    "log",
    "flags",
    "flag_rows",
    "flag_words",
    "config_file",
    "foreign_flags",
    "histogram",
    "allocator",
    "collector",
    "host",
    "limits",
    "words",
    "http_client",
    "environment",
}
# room -> rooms it may import besides itself and the leaves
ALLOWED = {
    "cli": {"api", "text", "hub", "plan", "engine", "model", "ops", "remote"},
    "api": {"text"},
    "text": set(),
    "hub": set(),
    "remote": set(),
    "plan": {"hub", "engine", "model", "ops"},
    "engine": {"model", "ops"},
    "model": {"ops"},
    "ops": set(),
    "demo": set(),
}
# Inside the API: a room, or a file beside them, imports only itself and what stands left of it.
API_ROOMS = (
    "wire", "http", "store", "life", "generation", "allocator", "text_queue", "batches", "state",
    "endpoints", "pages", "app", "serve", "run_batch",
)  # fmt: skip
OF_THE_PACKAGE = {"__version__", "INTERRUPTED"}  # in pyserve/__init__.py, which imports nothing
TORCH_FREE = {"api", "text", "hub", "remote", "demo"} | LEAVES
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_KERNEL_LINES = 500, 80, 150
MODULES = sorted(PACKAGE.rglob("*.py"))
PYTHON_FILES = [
    path
    for folder in ("pyserve", "tests", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
] + [ROOT / "setup.py"]
NATIVE_FILES = sorted(
    path for pattern in ("*.cpp", "*.h", "*.cu", "*.cuh") for path in (ROOT / "cuda").rglob(pattern)
)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module is not None
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    tree = ast.parse(path.read_text())
    here = room(path)
    for node, name in imports(tree):
        parts = name.split(".")
        if parts[0] == "torch":
            assert here not in TORCH_FREE, f"line {node.lineno}: {here} must not import torch"
        if parts[0] != "pyserve" or len(parts) == 1 or parts[1] in OF_THE_PACKAGE:
            continue
        target = parts[1]
        if here == "__main__":
            assert target == "cli"
        elif target not in LEAVES and target != here:
            assert here not in LEAVES, f"line {node.lineno}: leaf {here} imports {target}"
            assert target in ALLOWED[here], f"line {node.lineno}: {here} imports {target}"


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in MODULES
        if room(path) == "api" and path.parent.name + path.stem != "api__init__"
    ],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_imports_inside_the_api_go_one_way(path: Path) -> None:
    here = path.relative_to(PACKAGE / "api").parts[0].removesuffix(".py")
    allowed = API_ROOMS[: API_ROOMS.index(here) + 1]
    for node, name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[:2] == ["pyserve", "api"]:
            assert parts[2] in allowed, f"line {node.lineno}: {here} imports {parts[2]}"
        assert here != "wire" or parts[0] != "aiohttp", f"line {node.lineno}: wire imports aiohttp"


def test_no_wire_type_of_a_request_is_known_behind_the_job() -> None:
    behind = [*(PACKAGE / "api" / "generation").glob("*.py"), PACKAGE / "api/endpoints/answer.py"]
    for path in behind:
        for node, name in imports(ast.parse(path.read_text())):
            of_usage = (".Usage", ".PromptTokensDetails", ".CompletionTokensDetails")
            assert not name.startswith("pyserve.api.wire") or name.endswith(of_usage), (
                f"{path.name}: line {node.lineno}: {name}"
            )


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Also not inside a room, or among the leaves."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in MODULES
    }
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        found = {target for _, target in imports(ast.parse(path.read_text()))}
        modules = {name if name in names else name.rpartition(".")[0] for name in found}
        graph[name] = modules & names.keys() - {"pyserve"}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("pyserve.errors") < order.index("pyserve.cli")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_stand_at_the_top(path: Path) -> None:
    if room(path) == "cli":
        return
    tree = ast.parse(path.read_text())
    functions = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    inside = [node.lineno for function in functions for node, _ in imports(function)]
    assert not inside, f"imports inside functions in lines {inside}"


def test_the_api_the_leaves_and_the_command_line_import_without_torch() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if room(path) in TORCH_FREE | {"cli"} and path.name != "convert.py"
    ]
    code = (
        f"import importlib, sys\nfor name in {names!r}:\n    importlib.import_module(name)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_sizes(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", NATIVE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_native_sizes_and_headers(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= MAX_FILE_LINES
    assert "torch/extension.h" not in text
    start = None  # a function body: from a line ending in '{' at column 0 to '}' at column 0
    for number, line in enumerate(lines, 1):
        if re.match(r"^[A-Za-z].*\{$", line) and not line.startswith(("namespace", "extern")):
            start = start or number
        elif line.startswith("}"):
            if start is not None:
                assert number - start < MAX_KERNEL_LINES, f"line {start}: {number - start} lines"
            start = None


def test_the_top_level_holds_nothing_else() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {
        "pyproject.toml", "setup.py", "cuda", "pyserve", "tests", "bench", "Dockerfile",
        "README.md", ".ci", ".gitignore", "LICENSE",
    }  # fmt: skip
    assert top <= allowed


def test_nothing_that_runs_foreign_code() -> None:
    """No pickle, eval, exec or torch.load of anything that came from outside (design 5)."""
    banned = re.compile(
        r"\b(pickle|marshal|dill)\b|\b(eval|exec)\(|torch\.load\(|trust_remote_code=True"
    )
    for path in MODULES:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not banned.search(line), f"{path.name}:{number}: {line.strip()}"
