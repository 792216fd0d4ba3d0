"""Package closure on a made-up site-packages; start and memory of a process that is no model."""

from __future__ import annotations

import json
import os
import py_compile
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from bench.footprint import import_cost, installed, main, measure_start, without_bytecode
from bench.installed import closure, file_bytes, report
from bench.server_process import memory_of, running_server
from bench.stub import __file__ as stub_path

STUB = (sys.executable, str(stub_path))


def add_distribution(site: Path, name: str, requires: list[str], size: int = 10) -> None:
    folder = site / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    (site / f"{name}.py").write_bytes(b"#" * size)
    (folder / "RECORD").write_text(f"{name}.py,,\n{folder.name}/METADATA,,\ngone.py,,\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    add_distribution(tmp_path, "app", ["torch>=2", "web[fast]", 'old; python_version < "3"'])
    add_distribution(tmp_path, "torch", ["shared", "numbers-lib"])
    add_distribution(tmp_path, "web", ["shared", "Speed_Ups; extra == 'fast'", "x; extra == 'y'"])
    add_distribution(tmp_path, "speed-ups", ["web"])
    for name in ("shared", "numbers-lib", "old", "x", "unrelated"):
        add_distribution(tmp_path, name, [])
    return tmp_path


def test_closure_follows_extras_and_markers(site: Path) -> None:
    found = {d.metadata["Name"]: d for d in metadata.distributions(path=[str(site)])}
    assert closure("app", found) == {
        "app", "torch", "web", "speed-ups", "shared", "numbers-lib",
    }  # fmt: skip
    assert closure("torch", found) == {"torch", "shared", "numbers-lib"}
    assert closure("absent", found) == set()


def test_bytes_are_those_of_the_files_that_exist(site: Path) -> None:
    (app,) = [d for d in metadata.distributions(path=[str(site)]) if d.metadata["Name"] == "app"]
    described = os.path.getsize(site / "app-1.0.dist-info" / "METADATA")
    assert file_bytes(app) == 10 + described


def test_what_lies_without_bytecode_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("compiled", "bare"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.delenv("PYTHONPYCACHEPREFIX", raising=False)
    py_compile.compile(str(tmp_path / "compiled.py"))
    assert without_bytecode(sys.executable, ("compiled", "bare", "absent")) == ["bare"]


def test_the_installation_of_this_interpreter() -> None:
    found = installed(sys.executable)
    names = set(found["packages"])
    assert {"pyserve", "aiohttp", "msgspec", "yarl"} <= names  # yarl only through aiohttp
    assert not names & set(found["excluded"])
    assert {"torch", "sympy"} <= set(found["excluded"])
    assert not names & {"pytest", "ruff"}  # test tools are an extra
    assert found["bytes"] == sum(found["packages"].values()) > 10**7


def test_what_is_missing_is_named() -> None:
    with pytest.raises(SystemExit, match="no-such-package is not installed"):
        report("no-such-package", "torch")
    with pytest.raises(RuntimeError, match="import no_such_module fails.*ModuleNotFoundError"):
        import_cost(sys.executable, "no_such_module", 1)


def test_import_cost() -> None:
    cost = import_cost(sys.executable, "json", 3)
    assert 0 < cost["import_s"] < cost["interpreter_s"]
    assert cost["num_modules"] >= 1 and cost["imports_torch"] == 0
    assert cost["peak_bytes"] > 2**20


def test_one_start_with_load() -> None:
    start = measure_start(STUB, [], with_load=True)
    assert 0 < start.port_open_s <= start.health_s <= start.ready_s < start.first_token_s
    assert 0 < start.first_request_s < start.first_token_s
    assert start.phases == {"ready": start.ready_s}
    assert 2**20 < start.rss_ready_bytes <= start.peak_ready_bytes
    assert 0 < start.anonymous_loaded_bytes < start.rss_loaded_bytes <= start.peak_loaded_bytes
    assert start.max_busy_health_s > 0 and start.shutdown_s < 10


def test_a_server_that_dies_is_quoted() -> None:
    command = (sys.executable, "-c", "raise SystemExit('no weights today')")
    with running_server(command=command) as server:
        with pytest.raises(RuntimeError, match="(?s)exit code 1.*no weights today"):
            server.wait_ready(20)


def test_memory_counts_children() -> None:
    grandchild = "print('up', flush=True); input()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None and child.stdout.readline() == b"up\n"
    lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
    (own,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")]
    assert memory_of(child.pid).rss_bytes > own + 2 * 2**20
    child.communicate(b"\n")
    with pytest.raises(ProcessLookupError):
        memory_of(child.pid)


def test_command_line_without_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bench.footprint.MODULES", ("pyserve",))
    out = tmp_path / "out.json"
    assert main(["--no-start", "--runs", "1", "--json", str(out)]) == 0
    assert "beside torch" in capsys.readouterr().out
    result = json.loads(out.read_text())["result"]
    assert result["import"]["pyserve"]["imports_torch"] == 0
    assert result["installed"]["bytes"] > 0
