"""What leader and followers tell each other beside the steps, over a socket a follower."""

from __future__ import annotations

import socket

import msgspec

from pyserve.config import EngineConfig

MAX_BYTES = 2**20
BEAT_S = 0.25  # how often a follower says that it lives


class Begin(msgspec.Struct, frozen=True, tag=True):
    """What a follower has to know of the leader's plan to load its part.

    place_bytes, num_places   of the ring, whose descriptors come along.
    """

    num_slots: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    logits_tile_rows: int
    num_threads: int
    place_bytes: int
    num_places: int


class Planned(msgspec.Struct, frozen=True, tag=True):
    """What fits beside a rank's part of the model."""

    num_blocks: int
    max_model_len: int
    device: str  # what it is
    version: str  # of pyserve


class Loaded(msgspec.Struct, frozen=True, tag=True):
    seconds: float


class Shown(msgspec.Struct, frozen=True, tag=True):
    """What a card shows: CardMemory, before anything was loaded and now; and what a KV block takes
    there."""

    total_bytes: int
    used_before_bytes: int
    used_bytes: int
    block_bytes: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The last word of a rank."""

    reason: str


class Beat(msgspec.Struct, frozen=True, tag=True):
    pass


News = Begin | Planned | Loaded | Shown | Failed | Beat


class Start(msgspec.Struct, frozen=True):
    """The first word to a follower; the file that ProcessGroup takes comes along."""

    config: EngineConfig
    tp_rank: int
    log_level: str


def encode(news: News | Start) -> bytes:
    """Raises TypeError for what no message holds."""
    return msgspec.json.encode(news, enc_hook=str)  # a Path is its text


def decode_start(data: bytes) -> Start:
    return msgspec.json.decode(data, type=Start, dec_hook=lambda kind, text: kind(text))


def decode(data: bytes) -> News:
    news: News = msgspec.json.decode(data, type=News)
    return news


def path_of(fd: int) -> str:
    """A name of an open file of this process."""
    return f"/proc/self/fd/{fd}"


def receive(sock: socket.socket) -> tuple[News | None, list[int]]:
    """The next message and the descriptors that came along; None where the other end has gone."""
    data, fds, _, _ = socket.recv_fds(sock, MAX_BYTES, 16)
    return (decode(data) if data else None), fds
