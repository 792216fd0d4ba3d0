"""What pyproject.toml says of what is not ours: floors, bounds, and whose warnings are errors."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from aiohttp import web, web_protocol
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from pyserve.api.http import http_protocol
from pyserve.text.convert import MIN_TRANSFORMERS

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "tests" / "constraints.txt"
# The oldest release without the fault that pyproject.toml names.
SECURITY_FLOORS = {
    "aiohttp": "3.14.4",
    "jinja2": "3.1.6",
    "transformers": "5.3",
    "torch": "2.10",
}
# torch: the stable ABI (design, "Build and install"); aiohttp: PRIVATE_NAMES.
UPPER_BOUNDS = {"torch": "2.14", "aiohttp": "3.15"}
# Attributes of aiohttp's RequestHandler that http_protocol.py uses without a public way.
PRIVATE_NAMES = {"_close", "_force_close", "_messages", "_waiter"}


def section(name: str) -> list[Requirement]:
    """The requirements listed under `name` in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(rf"^{name} = \[(.*?)\]\n\n", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    return [Requirement(quoted) for quoted in re.findall(r'"(.+?)"', listed[1])]


RUNTIME = section("dependencies")
CONVERT = section("convert")
TEST = section("test")


def constraints() -> list[Requirement]:
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def bounds(requirement: Requirement) -> tuple[str | None, str | None]:
    """The version of >= and that of <; nothing else may be there."""
    found = {spec.operator: spec.version for spec in requirement.specifier}
    assert found.keys() <= {">=", "<"}, requirement
    return found.get(">="), found.get("<")


@pytest.mark.parametrize("requirement", [*RUNTIME, *CONVERT, *TEST], ids=lambda r: r.name)
def test_ranges_have_a_floor_and_are_open_upwards(requirement: Requirement) -> None:
    floor, bound = bounds(requirement)
    assert floor is not None
    assert bound == UPPER_BOUNDS.get(requirement.name)


@pytest.mark.parametrize("name", SECURITY_FLOORS)
def test_floors_keep_known_faults_out(name: str) -> None:
    (floor,) = (
        bounds(requirement)[0] for requirement in [*RUNTIME, *CONVERT] if requirement.name == name
    )
    assert floor is not None
    assert Version(floor) >= Version(SECURITY_FLOORS[name])
    assert Version(metadata.version(name)) >= Version(SECURITY_FLOORS[name])


@pytest.mark.parametrize("requirement", [*RUNTIME, *CONVERT, *TEST], ids=lambda r: r.name)
def test_constraints_pin_what_decides_whether_tests_pass(requirement: Requirement) -> None:
    """One version for each Python, within the range; torch's build is up to the index."""
    name = canonicalize_name(requirement.name)
    pinned = [pin for pin in constraints() if canonicalize_name(pin.name) == name]
    if name == "torch":
        assert pinned == []
        return
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        environment = {"python_version": python}
        (pin,) = (p for p in pinned if p.marker is None or p.marker.evaluate(environment))
        (spec,) = pin.specifier
        assert spec.operator == "==" and spec.version in requirement.specifier


def test_the_floor_of_transformers_holds_without_the_extra() -> None:
    (requirement,) = (r for r in CONVERT if r.name == "transformers")
    assert bounds(requirement)[0] == ".".join(map(str, MIN_TRANSFORMERS))
    assert set(map(str, CONVERT)) <= set(map(str, TEST))


def test_the_base_install_is_what_pyserve_imports() -> None:
    imported = set()
    for path in (ROOT / "pyserve").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                imported.add(node.module.partition(".")[0])
    modules = {"pyyaml": "yaml"}
    named = {modules.get(r.name, r.name.replace("-", "_")) for r in RUNTIME}
    # ninja is a program, and the headers of pybind11 are for the compiler.
    assert named - imported == {"ninja", "pybind11"}
    others = {
        name for name in imported - named - {"pyserve"} if name not in sys.stdlib_module_names
    }
    # Of aiohttp, and the three of the extra but protobuf, which only sentencepiece imports.
    assert others == {"yarl", "transformers", "sentencepiece"}


def test_every_folder_with_code_is_in_the_wheel() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = \[(.*?)\]\n", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    folders = {path.parent for path in (ROOT / "pyserve").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(re.findall(r'"(.+?)"', listed[1])) == packages | {"pyserve.demo", "pyserve.csrc"}


def test_the_readme_installs_with_the_constraints() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## Test\n+```bash\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert "pip install -c tests/constraints.txt -e '.[test]'\n" in block[1]


def test_private_names_of_aiohttp_are_the_listed_ones_and_there() -> None:
    """A release that lacks one must not be within the range."""
    source = (ROOT / "pyserve" / "api" / "http" / "http_protocol.py").read_text(encoding="utf-8")
    (protocol,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == http_protocol.HttpProtocol.__name__
    )
    used = {
        node.attr
        for node in ast.walk(protocol)
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr)
    }
    assert used - vars(http_protocol.HttpProtocol).keys() == PRIVATE_NAMES
    theirs = {slot for base in web.RequestHandler.__mro__ for slot in vars(base)}
    assert theirs >= PRIVATE_NAMES
    assert list(inspect.signature(web_protocol._ErrInfo).parameters) == ["status", "exc", "message"]
    importing = [
        path.name
        for path in sorted((ROOT / "pyserve").rglob("*.py"))
        if re.search(r"^from aiohttp.* import .*\b_", path.read_text("utf-8"), re.MULTILINE)
    ]
    assert importing == ["http_protocol.py"]


NOISY = """
import os, threading, warnings

def warn():
    warnings.warn("about itself", FutureWarning)

def leave_open():
    open(os.devnull)

class Bad:
    def __del__(self):
        raise ValueError("nobody catches this")

def drop():
    Bad()

def fail():
    raise ValueError("nobody catches this")

def start_thread():
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join(30)
"""
CASES = """
import asyncio, gc, sys, warnings
sys.path.insert(0, "site-packages")
import library
import pytest
from pyserve import noisy

@pytest.mark.parametrize("what", ["warn", "leave_open", "drop", "start_thread"])
@pytest.mark.parametrize("where", [noisy, library], ids=["ours", "theirs"])
def test(where, what):
    getattr(where, what)()

def test_a_warning_of_a_test():
    warnings.warn("mine", DeprecationWarning)

def test_a_loop_that_stays_open():
    asyncio.new_event_loop()
    gc.collect()

def test_a_coroutine_that_is_not_awaited():
    asyncio.sleep(0)

def test_that_returns():
    return 1
"""


def test_our_warnings_are_errors_and_others_are_not(tmp_path: Path) -> None:
    for folder in ("pyserve", "tests", "site-packages"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "pyserve" / "__init__.py").touch()
    (tmp_path / "pyserve" / "noisy.py").write_text(NOISY)
    (tmp_path / "site-packages" / "library.py").write_text(NOISY)
    (tmp_path / "tests" / "test_cases.py").write_text(CASES)
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "--timeout=60"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    passed = set(re.findall(r"^PASSED \S+::(\S+)", done.stdout, re.MULTILINE))
    failed = set(re.findall(r"^(?:FAILED|ERROR) \S+::(\S+)", done.stdout, re.MULTILINE))
    kinds = ("warn", "leave_open", "drop", "start_thread")
    assert passed - failed == {f"test[theirs-{kind}]" for kind in kinds}, done.stdout
    assert failed >= {f"test[ours-{kind}]" for kind in kinds}
    assert len(failed) == len(kinds) + 4
