"""Sequence: one token stream the scheduler moves, and all the engine knows about it.

token_ids are the tokens whose ids the host knows; num_tokens also counts placeholders, the tokens
that a step in flight will sample. num_computed_tokens counts tokens whose KV is valid or in flight.

    |<-- num_computed_tokens -->|          KV written, or written by a step in flight
    |<------ len(token_ids) ------->|      ids known to the host
    |<-------- num_tokens --------------->|
    |<-- num_host_tokens -->|              the host sends these; later ones the slot sampled itself
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from pyserve.client import Adapter, Constraint, SequenceStream
from pyserve.params import SamplingParams

NO_SLOT = -1
NEVER = 2**62  # a length that no sequence reaches
BACKGROUND_PRIORITY = 2**31  # behind all that a request may ask for


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """State of one sequence. Written by Engine, Scheduler and BlockManager, on the event loop.

    order            (priority, arrival): lower runs first, the highest is preempted first.
    user             whose it is: slots and places in the queue are shared between users.
    seed             of this sequence's draws; fixed at arrival so that recomputing repeats them.
    stop_token_ids   those that the model can produce.
    root_hash        parent of the first block's hash: separates adapters and cache salts.
    generation       names the present stay in a slot; results of an earlier one are dropped.
    block_hashes     of the full blocks of token_ids hashed so far.
    preimages        what they were made from: parent hash and token ids.
    num_offered_blocks
                     leading blocks that have been offered to the prefix cache, or came from it.
    next_offer_len   valid tokens from which on the block behind those is full.
    awaited_hash     a block that another sequence is computing; admission waits for it.
    num_wanted_blocks
                     free blocks that its last attempt at admission needed and did not find.
    constraint       which tokens may come next; None: any. It has accepted the output tokens that
                     the host knows, no more and no fewer.
    adapter          what is added to the base model; None: nothing.
    adapter_slot     where that lies on the device while the sequence runs.
    num_passed       sequences with another adapter that were admitted before it while it waited for
                     room for its own.
    preempted_s      when it was preempted; 0 once it has had another token since. The next token's
                     latency is counted from here.
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
        """It gives way to all that are not."""
        return self.order[0] >= BACKGROUND_PRIORITY

    @property
    def has_untold_prompt(self) -> bool:
        """Whether logits of its prompt are still wanted: none of it may come from a cache then."""
        return (
            self.params.num_prompt_logprobs is not None
            and len(self.stream.prompt_logprobs) < self.num_prompt_tokens - 1
        )

    @property
    def num_in_flight_tokens(self) -> int:
        """Placeholders: tokens sampled by steps whose results the host has not seen."""
        return self.num_tokens - len(self.token_ids)
