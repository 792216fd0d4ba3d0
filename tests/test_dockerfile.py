"""The Dockerfile against what it must keep to; its steps are not run here."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from pyserve.flags import parse_args

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text()
HEALTH_PORT = 8000


def stages() -> list[list[tuple[str, str]]]:
    """(instruction, its arguments) of each stage; what precedes the first FROM is left out."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: list[list[tuple[str, str]]] = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            found.append([])
        if found and instruction:
            found[-1].append((instruction, arguments))
    return found


BUILD, RUNTIME = stages()


def arguments(stage: list[tuple[str, str]], instruction: str) -> list[str]:
    return [given for name, given in stage if name == instruction]


def health_code() -> str:
    (check,) = arguments(RUNTIME, "HEALTHCHECK")
    command = json.loads(check[check.index("CMD ") + len("CMD ") :])
    assert command[:2] == ["python", "-c"]
    return str(command[2])


def test_what_serves_has_no_compiler() -> None:
    assert "-devel-" in arguments(BUILD, "FROM")[0]
    assert "devel" not in arguments(RUNTIME, "FROM")[0]
    installed = " ".join(arguments(RUNTIME, "RUN"))
    assert not re.search(r"nvcc|g\+\+|gcc|build-essential|python3-dev|cuda-toolkit", installed)
    # Only wheels come over, and without a layer of their own.
    assert arguments(RUNTIME, "COPY") == []
    assert "--mount=type=bind,from=build" in installed


def test_both_stages_are_one_distribution() -> None:
    (build,), (runtime,) = arguments(BUILD, "FROM"), arguments(RUNTIME, "FROM")
    assert build.split()[0].endswith("-ubuntu${UBUNTU}")
    assert runtime == "ubuntu:${UBUNTU}"


def test_the_server_is_not_root_and_owns_its_cache() -> None:
    names = [name for name, _ in RUNTIME]
    (user,) = arguments(RUNTIME, "USER")
    assert user not in ("root", "0")
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert "RUN" not in names[names.index("USER") :], "a step as root was meant"
    made = " ".join(arguments(RUNTIME, "RUN"))
    (volume,) = arguments(RUNTIME, "VOLUME")
    assert f"install -d -o {user} -g {user} {volume}" in made
    settings = " ".join(arguments(RUNTIME, "ENV"))
    assert f"HF_HOME={volume}/" in settings and f"PYSERVE_CACHE={volume}/" in settings


def test_how_it_starts_and_stops() -> None:
    assert arguments(RUNTIME, "ENTRYPOINT") == ['["python", "-m", "pyserve"]']
    assert arguments(RUNTIME, "EXPOSE") == [str(HEALTH_PORT)]
    assert arguments(RUNTIME, "STOPSIGNAL") == ["SIGTERM"]


def test_requirements_are_those_of_the_project() -> None:
    wanted = dict(re.findall(r'"([a-z0-9_]+)(>=[^"]+)"', PYPROJECT))
    asked = re.findall(r"'([a-z0-9_]+)(>=[^']+)'", (ROOT / "Dockerfile").read_text())
    assert {name for name, _ in asked} == {"torch", "setuptools", "ninja", "pybind11"}
    for name, versions in asked:
        assert wanted[name] == versions


def test_everything_the_wheel_is_made_of_is_copied() -> None:
    copied = {word for given in arguments(BUILD, "COPY") for word in given.split()[:-1]}
    packages = re.findall(r'"(pyserve)"|"(README\.md|LICENSE)"', PYPROJECT)
    needed = {name for pair in packages for name in pair if name}
    assert copied == needed | {"pyproject.toml", "setup.py", "cuda"}
    assert all((ROOT / name).exists() for name in copied)


@contextmanager
def answering(status: int) -> Iterator[int]:
    """The port of a server that answers /health with `status`, all else with 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(30)


@pytest.mark.parametrize(("status", "exit_code"), [(200, 0), (503, 1), (500, 1)])
def test_the_health_check(status: int, exit_code: int) -> None:
    code = health_code()
    assert str(HEALTH_PORT) in code
    with answering(status) as port:
        moved = code.replace(str(HEALTH_PORT), str(port))
        # A proxy of the environment must not be asked.
        env = {"http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
        done = subprocess.run([sys.executable, "-c", moved], env=env, check=False, timeout=60)
    assert done.returncode == exit_code


def test_the_kubernetes_recipe_says_what_pyserve_knows() -> None:
    """Its flags, its paths of health, its port, and times that fit each other."""
    documents = list(yaml.safe_load_all((ROOT / "bench" / "kubernetes.yaml").read_text()))
    assert [it["kind"] for it in documents] == ["Secret", "Deployment", "Service", "Ingress"]
    pod = documents[1]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    args = parse_args(container["args"])
    assert args.port == container["ports"][0]["containerPort"]
    assert args.shutdown_timeout + 5 < pod["terminationGracePeriodSeconds"]
    probes = {name: container[name]["httpGet"]["path"] for name in container if "Probe" in name}
    assert probes == {
        "startupProbe": "/health/live", "livenessProbe": "/health/live", "readinessProbe": "/health"
    }  # fmt: skip
    assert documents[2]["spec"]["ports"][0]["targetPort"] == args.port
