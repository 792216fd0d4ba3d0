"""Link: what ranks that torchrun has started see of each other, and how to share a model over it.

Tensor parallel divides the work of a step among the ranks, and pays two all-reduces a layer for it.
In a pipeline the ranks work one after the other: a step takes as long as on one that has all, and
the hidden states go from each to the next once. Chosen is what is faster for one request, of a
chunk of a prompt and a short answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from pyserve.model.decoder import Decoder
from pyserve.ops.group import Group

PROMPT_TOKENS, ANSWER_TOKENS = 2048, 256
LARGE_BYTES = 4 * 2**20  # half a second at 10 MB/s
# Of a matrix that no cache holds, and how many rows reach what the device can compute.
CARD_SIZE, CARD_ROWS = 8192, 2048
HOST_SIZE, HOST_ROWS = 4096, 64


class Link(NamedTuple):
    """latency_s, bytes_per_s   of an all-reduce: of a small one, and what a larger one adds
    read_bytes_per_s            of a matrix, by the product with one row
    flop_per_s                  by the product with many
    """

    latency_s: float
    bytes_per_s: float
    read_bytes_per_s: float
    flop_per_s: float


class Work(NamedTuple):
    """Of the layers of a whole model.

    token_bytes   of a token's hidden state.
    read_bytes    of the matrices that a step of one token reads.
    num_params    that a token meets.
    """

    num_layers: int
    token_bytes: int
    read_bytes: int
    num_params: int

    @classmethod
    def of(cls, shapes: Decoder) -> Work:
        linears, mixtures = shapes.layer_linears(), shapes.mixtures()
        return cls(
            len(shapes.layers),
            shapes.config.hidden_size * shapes.dtype.itemsize,
            sum(it.matrix.nbytes for it in linears)
            + sum(it.config.top_k * it.bytes_each for it in mixtures),
            sum(it.num_params for it in linears)
            + sum(it.config.top_k * it.params_each for it in mixtures),
        )


class Estimate(NamedTuple):
    """Seconds of a request, either way."""

    tensor_s: float
    pipeline_s: float


def estimate(link: Link, work: Work, num_ranks: int) -> Estimate:
    """Of a chunk of PROMPT_TOKENS and ANSWER_TOKENS steps of one."""
    prompt, token = (_step(link, work, num_ranks, count) for count in (PROMPT_TOKENS, 1))
    return Estimate(*(one + ANSWER_TOKENS * each for one, each in zip(prompt, token, strict=True)))


def _step(link: Link, work: Work, num_ranks: int, num_tokens: int) -> Estimate:
    alone_s = max(
        work.read_bytes / link.read_bytes_per_s, 2 * work.num_params * num_tokens / link.flop_per_s
    )
    message_s = link.latency_s + num_tokens * work.token_bytes / link.bytes_per_s
    return Estimate(
        alone_s / num_ranks + 2 * work.num_layers * message_s,
        alone_s + num_ranks * message_s,  # from each to the next, and from the last to the first
    )


def measure(group: Group, device: torch.device) -> Link:
    """Measured by all ranks at the same time, each of which gets the means of all."""
    is_card = device.type == "cuda"
    dtype = torch.bfloat16 if is_card else torch.float32
    size, num_rows = (CARD_SIZE, CARD_ROWS) if is_card else (HOST_SIZE, HOST_ROWS)

    def numbers(*shape: int) -> torch.Tensor:  # of zeros a card multiplies more a second
        return torch.rand(shape, dtype=dtype, device=device)

    def seconds(call: Callable[[], object], num_times: int) -> float:
        """Of one call; the first is not counted."""
        began_s = 0.0
        for _ in range(1 + num_times):
            call()
            if is_card:
                torch.cuda.synchronize(device)
            began_s = began_s or time.perf_counter()
        return (time.perf_counter() - began_s) / num_times

    small, large = numbers(64), numbers(LARGE_BYTES // dtype.itemsize)
    matrix, rows = numbers(size, size), numbers(size, num_rows)
    seen = torch.tensor(
        [
            seconds(lambda: group.all_reduce(small), 20),
            seconds(lambda: group.all_reduce(large), 3),
            seconds(lambda: torch.mv(matrix, rows[:, 0]), 5),
            seconds(lambda: torch.mm(matrix, rows), 3),
        ],
        device=device,
    )
    group.all_reduce(seen)
    small_s, large_s, read_s, product_s = (seen / group.tp_size).tolist()
    return Link(
        latency_s=small_s,
        bytes_per_s=LARGE_BYTES / max(large_s - small_s, 1e-9),
        read_bytes_per_s=matrix.nbytes / read_s,
        flop_per_s=2 * size * size * num_rows / product_s,
    )
