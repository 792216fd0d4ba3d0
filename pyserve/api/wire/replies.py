"""The answers of the endpoints for operators and health probes, as /openapi.json describes them."""

from __future__ import annotations

import msgspec


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The server accepts requests.

    `loop_lag_s` is how late the server's event loop has recently been, and `step_age_s` how long
    the running step of the model has taken so far, both in seconds.
    """

    status: str
    loop_lag_s: float
    step_age_s: float


class NotReady(msgspec.Struct, frozen=True, kw_only=True):
    """The server accepts no requests.

    While it starts, `phase` is what it is doing, `progress` how much of that is done (from 0 to 1),
    `eta_s` the estimated seconds until it is done, and `ended` the seconds that each earlier phase
    has taken. Otherwise `reason` says why no requests are accepted.
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
