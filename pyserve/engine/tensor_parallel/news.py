"""Messages between the leader and a follower other than executor calls, encoded as JSON."""

from __future__ import annotations

import socket

import msgspec

from pyserve.config import EngineConfig

MAX_BYTES = 2**20
BEAT_S = 0.25  # how often a follower says that it lives


class Begin(msgspec.Struct, frozen=True, tag=True):
    """What a follower must know of the leader's plan to load its part.

    num_threads               CPU threads that a step may use in this process.
    place_bytes, num_places   sizes of the ring, whose file descriptors come with the message.
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
    """What fits on a rank beside its part of the model."""

    num_blocks: int  # KV blocks
    max_model_len: int
    device: str  # a description for the log
    model: str  # fingerprint of the model's files; "" from a rank that reads the leader's own


class Loaded(msgspec.Struct, frozen=True, tag=True):
    """A follower has loaded its part of the model, in so many seconds."""

    seconds: float


class Shown(msgspec.Struct, frozen=True, tag=True):
    """The memory of a rank's card: in use before anything was loaded, in use now, and what one KV
    block takes there."""

    total_bytes: int
    used_before_bytes: int
    used_bytes: int
    block_bytes: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The last message of a rank that ends with an error."""

    reason: str


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A heartbeat: the follower's process is alive."""


News = Begin | Planned | Loaded | Shown | Failed | Beat


class Start(msgspec.Struct, frozen=True):
    """The first message to a follower; the file through which the ranks meet comes with it."""

    config: EngineConfig
    tp_rank: int
    log_level: str


def encode(news: News | Start) -> bytes:
    """Encode a message as JSON."""
    return msgspec.json.encode(news, enc_hook=str)  # enc_hook writes Paths as text


def decode_start(data: bytes) -> Start:
    """Decode a Start; dec_hook makes Paths from text. Raises msgspec.ValidationError."""
    return msgspec.json.decode(data, type=Start, dec_hook=lambda kind, text: kind(text))


def decode(data: bytes) -> News:
    """Decode any message but a Start. Raises msgspec.ValidationError."""
    news: News = msgspec.json.decode(data, type=News)
    return news


def path_of(fd: int) -> str:
    """A path by which this process can open its file descriptor `fd` again."""
    return f"/proc/self/fd/{fd}"


def receive(sock: socket.socket) -> tuple[News | None, list[int]]:
    """The next message and the file descriptors that came with it.

    The message is None if the other end is closed. Raises OSError where the connection is broken.
    """
    data, fds, _, _ = socket.recv_fds(sock, MAX_BYTES, 16)
    return (decode(data) if data else None), fds
