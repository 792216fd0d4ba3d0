"""Sequence: one token stream that the scheduler moves, with all that the engine knows about it.

token_ids are the tokens whose ids the host knows. num_tokens also counts placeholders: tokens that
steps in flight will sample. num_computed_tokens counts the tokens whose KV is valid or is being
computed by a step in flight. num_host_tokens is len(token_ids) at the last admission: the host
sends these ids to the device, which keeps the ids of later tokens in the slot itself.

    |<-- num_computed_tokens -->|          KV valid, or being computed by a step in flight
    |<------ len(token_ids) ------->|      ids known to the host
    |<-------- num_tokens --------------->|
    |<-- num_host_tokens -->|              ids that the host sends to the device
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pyserve.client import Adapter, Constraint, SequenceStream
from pyserve.params import SamplingParams

NO_SLOT = -1
NEVER = 2**62  # a length that no sequence reaches
BACKGROUND_PRIORITY = 2**31  # larger, so later in order, than any priority of a request


class Status(Enum):
    """Whether a sequence is in the waiting queue, has a slot and blocks, or has ended."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one sequence. Written by Engine, Scheduler and BlockManager, on the event loop.

    max_total_tokens maximum number of prompt and output tokens together.
    order            (priority, arrival): the lowest runs first, the highest is preempted first.
    seed             random seed of its sampling, fixed at arrival so that a recomputation after
                     preemption samples the same tokens.
    stop_token_ids   tokens of the vocabulary that end the sequence.
    root_hash        parent of the first block's hash; differs between adapters and cache salts.
    user             slots and places in the queue are shared fairly between users.
    slot, generation the slot that it runs in, and the number of this stay in a slot: results of
                     steps of an earlier stay are dropped.
    block_hashes     hashes of the leading full blocks of token_ids, as far as they are computed.
    preimages        the bytes that each hash was computed from: parent hash and token ids.
    num_offered_blocks
                     leading blocks that came from the prefix cache or have been put into it.
    next_offer_len   length in tokens at which the next block is full and can be cached.
    awaited_hash     hash of a block that another sequence is computing; admission waits for it.
    num_wanted_blocks
                     free blocks that its last attempt at admission needed but did not find.
    is_admitted      it has been admitted at least once.
    constraint       which tokens may come next; None: any. It has accepted exactly the output
                     tokens in token_ids.
    adapter          the LoRA adapter; None: the base model.
    adapter_slot     the device slot of the adapter while the sequence runs.
    num_passed       how many sequences with an adapter have been admitted before it while it waited
                     for an adapter slot.
    preempted_s      time.monotonic() when it was preempted, from which the latency of its next
                     token is counted; 0 once that token has come.
    """

    stream: SequenceStream
    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    max_total_tokens: int
    order: tuple[int, int]
    seed: int
    stop_token_ids: frozenset[int]
    root_hash: bytes
    num_tokens: int
    user: str = ""
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    num_host_tokens: int = 0
    slot: int = NO_SLOT
    generation: int = -1
    block_ids: list[int] = field(default_factory=list)
    kv_capacity: int = 0  # tokens that block_ids hold
    block_hashes: list[bytes] = field(default_factory=list)
    preimages: list[bytes] = field(default_factory=list)
    num_offered_blocks: int = 0
    next_offer_len: int = NEVER
    awaited_hash: bytes | None = None
    num_wanted_blocks: int = 0
    is_admitted: bool = False
    constraint: Constraint | None = None
    adapter: Adapter | None = None
    adapter_slot: int = NO_SLOT
    num_passed: int = 0
    preempted_s: float = 0.0

    @property
    def is_background(self) -> bool:
        """Whether it gives way to every sequence that is not in the background."""
        return self.order[0] >= BACKGROUND_PRIORITY

    @property
    def has_untold_prompt(self) -> bool:
        """Whether it still needs prompt logprobs, so none of its prompt may come from the cache."""
        return (
            self.params.num_prompt_logprobs is not None
            and len(self.stream.prompt_logprobs) < self.num_prompt_tokens - 1
        )

    @property
    def num_in_flight_tokens(self) -> int:
        """Number of placeholders: tokens of steps in flight, whose ids the host does not know."""
        return self.num_tokens - len(self.token_ids)
