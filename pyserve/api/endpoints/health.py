"""Readiness (/health, /health/ready, /ping) and liveness (/health/live) of the server.

The event loop that answers here also serves all requests, so any answer shows that it runs. The
body reports how late the loop has been and how long the running step has taken, in seconds.
"""

from __future__ import annotations

from aiohttp import web

from pyserve.api.http.delivery import json_response
from pyserve.api.state import STATE, ServerState
from pyserve.words import counted


async def health(request: web.Request) -> web.StreamResponse:
    """Readiness: 200 if a request would be accepted now, else 503 with the server's status."""
    status, body = describe(request.app[STATE])
    return json_response(body, status=status)


async def health_live(request: web.Request) -> web.StreamResponse:
    """Liveness: 200 as long as the event loop runs, whatever else is wrong."""
    state = request.app[STATE]
    return json_response({"status": "live", "loop_lag_s": round(state.watchdog.recent_lag_s, 3)})


def describe(state: ServerState) -> tuple[int, dict[str, object]]:
    """HTTP status and body of /health."""
    if state.status == "starting":
        return 503, {"status": "starting", **state.startup.describe()}
    if state.status == "draining":
        num_running = state.num_in_flight
        rest = f", {counted(num_running, 'request')} still to finish" if num_running else ""
        reason = f"the server is shutting down{rest}"
        return 503, {"status": "draining", "reason": reason}
    assert state.loaded is not None
    # Ask the engine itself: serve.py sets `status` only a moment after the engine has stopped.
    stats = state.loaded.engine.stats()
    if stats.error is not None:
        return 503, {"status": "failed", "reason": stats.error}
    deadline_s = stats.step_deadline_s
    if deadline_s is not None and stats.step_age_s > deadline_s:
        reason = f"a step has run for {stats.step_age_s:.1f} s, its limit is {deadline_s:.1f} s"
        return 503, {"status": "stuck", "reason": reason}
    return 200, {
        "status": "ready",
        "loop_lag_s": round(state.watchdog.recent_lag_s, 3),
        "step_age_s": round(stats.step_age_s, 3),
    }
