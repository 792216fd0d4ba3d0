"""Ranks: how the leader brings all ranks of a model together while it starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from pyserve import __version__, host, log
from pyserve.config import EngineConfig, launched
from pyserve.engine.batch import max_step_words
from pyserve.engine.planner import CardMemory, MemoryPlan, with_blocks
from pyserve.engine.tensor_parallel import calls
from pyserve.engine.tensor_parallel.followers import Followers
from pyserve.engine.tensor_parallel.launched import LaunchedFollowers
from pyserve.engine.tensor_parallel.news import Begin, Loaded, Planned, Shown
from pyserve.engine.tensor_parallel.spawned import Spawned
from pyserve.errors import StartupError
from pyserve.ops.group import Group

PLAN_S = 300.0  # to start a process, import what serves, and read config.json on a slow disk
LOAD_S = 3600.0  # longer than the leader takes to load its own part
MEASURE_S = 60.0


class Ranks:
    """Where one rank has all of the model, there is nobody else and nothing to do.

    followers, group   None then; `group` is None until `join`, too.
    """

    def __init__(
        self, config: EngineConfig, device: torch.device, spawned: Sequence[Spawned] = ()
    ) -> None:
        """Tells the others' processes what to do, and starts them where they are not `spawned` yet,
        or meets those that torchrun has started. Raises DeviceError where they do not come."""
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
        """That a step may use on a CPU, in each process."""
        return max(1, host.num_threads() // self._config.num_ranks)

    @contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """Nobody outlives a start that has failed."""
        try:
            yield
        except BaseException:
            if self.followers is not None:
                self.followers.close()
            raise

    def join(self, plan: MemoryPlan) -> MemoryPlan:
        """Let all begin to load; the plan that each of them has room for. Raises StartupError."""
        if self.followers is None:
            return plan
        num_ranks = self._config.num_ranks
        part = "its layers" if self._config.pipeline_parallel_size > 1 else "its part of each layer"
        all_planned = self.followers.wait(Planned, PLAN_S)
        num_blocks = min(plan.num_blocks, *(it.num_blocks for it in all_planned))
        max_model_len = min(plan.max_model_len, *(it.max_model_len for it in all_planned))
        plan = replace(with_blocks(plan, num_blocks), max_model_len=max_model_len)
        for tp_rank, planned in enumerate(all_planned, 1):
            if planned.version != __version__:
                raise StartupError(
                    f"rank {tp_rank} runs pyserve {planned.version}, and rank 0 {__version__}: "
                    "install one version everywhere"
                )
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

    def wait_loaded(self) -> None:
        """Until all others have loaded too. Raises StartupError."""
        if self.followers is None:
            return
        for tp_rank, loaded in enumerate(self.followers.wait(Loaded, LOAD_S), 1):
            log.get_logger().info("rank %d has loaded its part in %.1f s", tp_rank, loaded.seconds)

    def measured(self) -> list[tuple[CardMemory, CardMemory, int]]:
        """What the others' cards showed before anything was loaded, and show now; and the bytes of
        a KV block there."""
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
