"""Ranks: how the leader coordinates all ranks of a model during its start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from pyserve import host, log
from pyserve.config import EngineConfig, launched
from pyserve.engine.batch import max_step_words
from pyserve.engine.planner import CardMemory, MemoryPlan, with_blocks
from pyserve.engine.tensor_parallel import calls
from pyserve.engine.tensor_parallel.followers import Followers
from pyserve.engine.tensor_parallel.launched import LaunchedFollowers
from pyserve.engine.tensor_parallel.news import Begin, Loaded, Planned, Shown
from pyserve.engine.tensor_parallel.spawned import Spawned
from pyserve.errors import StartupError
from pyserve.model.fingerprint import fingerprint
from pyserve.ops.group import Group

# How long the leader waits for its followers.
PLAN_S = 300.0  # to start a process, import torch and read config.json from a slow disk
LOAD_S = 3600.0  # to load their parts after the leader has loaded its own
MEASURE_S = 60.0  # to measure the card's memory


class Ranks:
    """All ranks of a model, as the leader sees them. With a single rank every method does nothing.

    followers   the other ranks; None with a single rank.
    group       their process group; None with a single rank, and until `join`.
    """

    def __init__(
        self, config: EngineConfig, device: torch.device, spawned: Sequence[Spawned] = ()
    ) -> None:
        """Start the followers' processes if needed, or connect to those that torchrun has started.

        spawned  the processes, if they have been started already.

        Raises DeviceError if the ranks of torchrun cannot be reached.
        """
        self._config = config
        self._device = device
        self.followers: Followers | LaunchedFollowers | None = None
        self.group: Group | None = None
        if config.num_ranks > 1:
            is_launched = launched() is not None
            self.followers = (
                LaunchedFollowers(device) if is_launched else Followers(config, spawned)
            )

    @property
    def num_threads(self) -> int:
        """CPU threads that a step may use in each process."""
        return max(1, host.num_threads() // self._config.num_ranks)

    @contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """End all followers if the body of the `with` raises."""
        try:
            yield
        except BaseException:
            if self.followers is not None:
                self.followers.close()
            raise

    def join(self, plan: MemoryPlan) -> MemoryPlan:
        """Agree on a plan for which every rank has room, let all begin to load and join the group.

        Returns that plan. Raises StartupError.
        """
        if self.followers is None:
            return plan
        num_ranks = self._config.num_ranks
        part = "its layers" if self._config.pipeline_parallel_size > 1 else "its part of each layer"
        all_planned = self.followers.wait(Planned, PLAN_S)
        self._check_models(all_planned)
        num_blocks = min(plan.num_blocks, *(it.num_blocks for it in all_planned))
        max_model_len = min(plan.max_model_len, *(it.max_model_len for it in all_planned))
        plan = replace(with_blocks(plan, num_blocks), max_model_len=max_model_len)
        for tp_rank, planned in enumerate(all_planned, 1):
            log.get_logger().info(
                "rank %d of %d holds %s on %s", tp_rank, num_ranks, part, planned.device
            )
        begin = Begin(
            num_slots=plan.num_slots,
            max_num_batched_tokens=plan.max_num_batched_tokens,
            max_model_len=max_model_len,
            block_size=plan.block_size,
            logits_tile_rows=plan.logits_tile_rows,
            num_threads=self.num_threads,
            place_bytes=0,
            num_places=0,
        )
        num_step_words = max_step_words(
            plan.max_num_batched_tokens, plan.num_slots, max_model_len=max_model_len,
            block_size=plan.block_size, num_adapter_slots=self._config.num_adapter_slots,
        )  # fmt: skip
        self.followers.begin(begin, num_step_words=num_step_words)
        self.group = self.followers.join(self._device)
        return plan

    def _check_models(self, all_planned: Sequence[Planned]) -> None:
        """Raise StartupError unless all followers have the files that the leader has."""
        if not any(planned.model for planned in all_planned):
            return
        folder = self._config.model_path
        model = fingerprint(folder, has_weights=self._config.load_format != "dummy")
        for tp_rank, planned in enumerate(all_planned, 1):
            if planned.model != model:
                raise StartupError(
                    f"the model of rank {tp_rank} is not that of rank 0 in {folder}, or another "
                    "revision of it: all machines must have the same files"
                )

    def wait_loaded(self) -> None:
        """Wait until all followers have loaded their parts. Raises StartupError."""
        if self.followers is None:
            return
        for tp_rank, loaded in enumerate(self.followers.wait(Loaded, LOAD_S), 1):
            log.get_logger().info("rank %d has loaded its part in %.1f s", tp_rank, loaded.seconds)

    def measured(self) -> list[tuple[CardMemory, CardMemory, int]]:
        """The memory of each follower's card before anything was loaded, and now, and the bytes of
        a KV block there. Raises StartupError."""
        if self.followers is None:
            return []
        self.followers.tell(calls.Measure())
        return [
            (
                CardMemory(shown.total_bytes, shown.used_before_bytes),
                CardMemory(shown.total_bytes, shown.used_bytes),
                shown.block_bytes,
            )
            for shown in self.followers.wait(Shown, MEASURE_S)
        ]
