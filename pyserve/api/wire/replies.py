"""The answers of the endpoints for operators and health probes, as /openapi.json describes them."""

from __future__ import annotations

import msgspec


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """seconds: how late the event loop has been, and how long the running step takes."""

    status: str
    loop_lag_s: float
    step_age_s: float


class NotReady(msgspec.Struct, frozen=True, kw_only=True):
    """While starting: the phase, how much of it is done (0 to 1), seconds to its end.

    ended  the seconds of the phases before it.
    """

    status: str
    phase: str | None = None
    progress: float | None = None
    eta_s: float | None = None
    ended: dict[str, float] = {}
    reason: str | None = None


class Live(msgspec.Struct, frozen=True, kw_only=True):
    status: str
    loop_lag_s: float


class Load(msgspec.Struct, frozen=True):
    server_load: int


class Done(msgspec.Struct, frozen=True):
    is_done: bool = msgspec.field(name="success")


class Aborted(msgspec.Struct, frozen=True):
    status: str
    aborted: int


class Sleeping(msgspec.Struct, frozen=True):
    status: str
    level: int


class Awake(msgspec.Struct, frozen=True):
    status: str
    tags: list[str] | None


class IsSleeping(msgspec.Struct, frozen=True):
    is_sleeping: bool


class Version(msgspec.Struct, frozen=True):
    version: str
