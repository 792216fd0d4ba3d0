"""What the server says about itself: /health, /health/ready and /ping; /health/live.

The loop that answers is the loop that serves, so an answer at all is its heartbeat; how late it
has been, and how long the running step takes, are in the answer.
"""

from __future__ import annotations

from aiohttp import web

from pyserve.api.http.delivery import json_response
from pyserve.api.state import STATE, ServerState
from pyserve.words import counted


async def health(request: web.Request) -> web.StreamResponse:
    """Ready: 200 where a request would be taken now; else 503, and where the server stands."""
    status, body = describe(request.app[STATE])
    return json_response(body, status=status)


async def health_live(request: web.Request) -> web.StreamResponse:
    """Alive: 200 as long as the event loop runs, whatever else is amiss."""
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
    # The engine itself is asked: serve.py learns of its end a moment later.
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
