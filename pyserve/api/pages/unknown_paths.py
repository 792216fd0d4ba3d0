"""UnknownPaths: errors for paths and methods that do not exist; each suggests one that does."""

from __future__ import annotations

import difflib
import functools
import re
import time
from collections import OrderedDict
from collections.abc import Iterable

from aiohttp import web

from pyserve import __version__, features
from pyserve.api.generation.request_log import LineBudget
from pyserve.api.http.request_id import current as current_request_id
from pyserve.errors import MethodNotAllowedError, NotFoundError
from pyserve.log import get_logger

MAX_PATH_CHARS = 100
MAX_KNOWN_PATHS = 256
LINES_PER_S, MAX_BURST_LINES = 0.1, 20.0
API = "/v1"
_UNSAFE = re.compile(r"[^!-~]")
# Paths of Ollama, llama.cpp, TGI, FastAPI and Kubernetes -> the path that does the same here.
ELSEWHERE = {
    "/api/chat": "/v1/chat/completions", "/api/generate": "/v1/completions",
    "/api/tags": "/v1/models", "/api/show": "/v1/models", "/api/version": "/version",
    "/generate": "/v1/completions", "/generate_stream": "/v1/completions",
    "/completion": "/v1/completions", "/redoc": "/docs", "/healthz": "/health",
    "/livez": "/health/live", "/readyz": "/health/ready", "/v1": "/v1/models",
    "/v1/chat": "/v1/chat/completions",
}  # fmt: skip
ASKED_BY_BROWSERS = ("/favicon.ico", "/robots.txt")


class UnknownPaths:
    """Makes these errors for one server, and logs each unknown path once.

    routes  (method, path) of the routes that exist and are not patterns.
    """

    def __init__(self, routes: Iterable[tuple[str, str]], *, root_path: str) -> None:
        self._methods: dict[str, list[str]] = {}
        for method, path in routes:
            self._methods.setdefault(path, []).append(method)
        self._root_path = root_path
        self._budget = LineBudget(LINES_PER_S, MAX_BURST_LINES)
        self._logged: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._hint = functools.lru_cache(maxsize=MAX_KNOWN_PATHS)(self._find_hint)

    def not_found(self, request: web.Request) -> NotFoundError:
        """The error for a path that does not exist; logs it."""
        path = shown_path(request)
        error = NotFoundError(
            f"there is no {request.method[:20]} {path} here: {self._hint(request.method, path)}"
        )
        self._log(request.method, path, error.message)
        return error

    def wrong_method(self, request: web.Request, allowed: Iterable[str]) -> MethodNotAllowedError:
        """The error for a method that the path does not support; `allowed` are those it does."""
        verbs = " or ".join(sorted(allowed))
        return MethodNotAllowedError(
            f"{request.method[:20]} is not allowed on {shown_path(request)}: use {verbs}"
        )

    def _find_hint(self, method: str, path: str) -> str:
        prefix = self._root_path if path.startswith(self._root_path + "/") else ""
        plain = re.sub("/+", "/", "/" + path.removeprefix(prefix)).rstrip("/").lower()
        if API + plain in self._methods:
            return f"the API is under {API}, use {self._use(method, prefix, API + plain)}"
        near = plain if plain in self._methods else ELSEWHERE.get(plain)
        if near is None:
            for name in features.PATHS:
                if f"{plain}/".startswith(f"{name}/") or f"{API}{plain}/".startswith(f"{name}/"):
                    return f"{name} is not built yet in pyserve {__version__}"
            near = self._nearest(plain)
        if near is None:
            return f"the API is under {API}, and {prefix}/docs shows all of it"
        return f"use {self._use(method, prefix, near)}"

    def _nearest(self, plain: str) -> str | None:
        # A known path may have too much in front: /v1/v1/models, /openai/deployments/x/models.
        tails = {path.removeprefix(API): path for path in self._methods if path != "/"}
        inside = [tail for tail in tails if plain.endswith(tail)]
        if inside:
            return tails[max(inside, key=len)]
        found = difflib.get_close_matches(plain, self._methods, n=1, cutoff=0.7)
        return found[0] if found else None

    def _use(self, method: str, prefix: str, path: str) -> str:
        methods = self._methods[path]
        return f"{method if method in methods else methods[0]} {prefix}{path}"

    def _log(self, method: str, path: str, message: str) -> None:
        """Log a path once, and few paths per minute.

        A scanner tries thousands of paths, and a client may try the same one for ever.
        """
        if path in ASKED_BY_BROWSERS:
            return
        key = (method, path)
        is_new = key not in self._logged
        self._logged[key] = None
        self._logged.move_to_end(key)
        if len(self._logged) > MAX_KNOWN_PATHS:
            self._logged.popitem(last=False)
        if not is_new or not self._budget.take(time.monotonic()):
            return
        num_dropped = self._budget.pop_dropped()
        others = f" ({num_dropped} other unknown paths before it)" if num_dropped else ""
        get_logger().info("request %s: %s%s", current_request_id.get(), message, others)


def shown_path(request: web.Request) -> str:
    """The path of a request as it was sent, without its query, shortened and made printable."""
    path = _UNSAFE.sub("?", request.rel_url.raw_path)
    return path if len(path) <= MAX_PATH_CHARS else f"{path[:MAX_PATH_CHARS]}..."
