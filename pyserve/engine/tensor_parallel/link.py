"""Link: measures the link between ranks that torchrun started, to choose how they share a model.

Tensor parallel divides the work of a step among the ranks, at the cost of two all-reduces a layer.
In a pipeline the ranks work one after the other: a step takes as long as on a single rank with all
layers, and the hidden states travel from each rank to the next once. The estimate decides for the
way that is faster for one request with a prompt of one chunk and a short answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from pyserve.model.decoder import Decoder
from pyserve.ops.group import Group

PROMPT_TOKENS, ANSWER_TOKENS = 2048, 256
LARGE_BYTES = 4 * 2**20  # takes half a second at 10 MB/s
# The measured products have a matrix of SIZE x SIZE, which no cache holds. With ROWS rows they
# reach the compute limit of the device.
CARD_SIZE, CARD_ROWS = 8192, 2048
HOST_SIZE, HOST_ROWS = 4096, 64


class Link(NamedTuple):
    """Measured speeds.

    latency_s         time of a small all-reduce.
    bytes_per_s       rate of the additional bytes of a large all-reduce.
    read_bytes_per_s  rate at which a matrix is read, from its product with one row.
    flop_per_s        floating-point rate, from its product with many rows.
    """

    latency_s: float
    bytes_per_s: float
    read_bytes_per_s: float
    flop_per_s: float


class Work(NamedTuple):
    """The work of all layers of a model.

    token_bytes   bytes of one token's hidden state.
    read_bytes    bytes of the matrices that a step of one token reads.
    num_params    parameters that one token is multiplied with.
    """

    num_layers: int
    token_bytes: int
    read_bytes: int
    num_params: int

    @classmethod
    def of(cls, shapes: Decoder) -> Work:
        """The work of a whole model, made on the meta device."""
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
    """Estimated seconds of one request, by tensor parallel and by a pipeline."""

    tensor_s: float
    pipeline_s: float


def estimate(link: Link, work: Work, num_ranks: int) -> Estimate:
    """Estimate one prefill chunk of PROMPT_TOKENS tokens followed by ANSWER_TOKENS decode steps."""
    prompt, token = (_step(link, work, num_ranks, count) for count in (PROMPT_TOKENS, 1))
    return Estimate(*(one + ANSWER_TOKENS * each for one, each in zip(prompt, token, strict=True)))


def _step(link: Link, work: Work, num_ranks: int, num_tokens: int) -> Estimate:
    alone_s = max(
        work.read_bytes / link.read_bytes_per_s, 2 * work.num_params * num_tokens / link.flop_per_s
    )
    message_s = link.latency_s + num_tokens * work.token_bytes / link.bytes_per_s
    return Estimate(
        alone_s / num_ranks + 2 * work.num_layers * message_s,
        # One transfer from each rank to the next, and one from the last back to the first.
        alone_s + num_ranks * message_s,
    )


def measure(group: Group, device: torch.device) -> Link:
    """Measure a Link. All ranks call this at the same time, and all get the mean of the results."""
    is_card = device.type == "cuda"
    dtype = torch.bfloat16 if is_card else torch.float32
    size, num_rows = (CARD_SIZE, CARD_ROWS) if is_card else (HOST_SIZE, HOST_ROWS)

    def numbers(*shape: int) -> torch.Tensor:  # not zeros: a card multiplies those faster
        return torch.rand(shape, dtype=dtype, device=device)

    def seconds(call: Callable[[], object], num_times: int) -> float:
        """The mean seconds of one call; a first call is not counted."""
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
