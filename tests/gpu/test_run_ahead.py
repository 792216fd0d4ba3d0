"""Running ahead on a card: the same tokens, bit for bit, as when each step is awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from pyserve.client import Adapter, EngineInfo, SequenceRequest, SequenceStream
from pyserve.engine.adapter_slots import AdapterSlots
from pyserve.engine.async_engine import AsyncEngine
from pyserve.engine.batch import max_update_words
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.cuda_runner import CudaRunner
from pyserve.engine.engine import Engine
from pyserve.engine.executor import StepExecutor
from pyserve.engine.scheduler import Scheduler
from pyserve.engine.slots import SlotAllocator
from pyserve.engine.state import StepLimits
from pyserve.model.config import ModelConfig
from pyserve.model.decoder import Decoder
from pyserve.model.loader import load_model
from pyserve.model.placement import Placement
from pyserve.params import SamplingParams
from tests.engine.tiny import VOCAB_SIZE, write_model

pytestmark = pytest.mark.gpu

CARD = torch.device("cuda", 0)
MAX_MODEL_LEN = 256
NUM_SLOTS = 8


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = write_model(
        tmp_path_factory.mktemp("models") / "tiny",
        hidden_size=256, head_dim=64, intermediate_size=512,
    )  # fmt: skip
    model = load_model(
        folder, ModelConfig.from_path(folder), Placement(torch.bfloat16, CARD),
        load_format="dummy", seed=0, progress=lambda done, total: None,
    )  # fmt: skip
    for place in model.destinations().values():
        if place.dummy_mean == 0.0:
            place.view.mul_(8.0)  # so large that the next token depends on all before it
    return model


def engine_for(
    decoder: Decoder, depth: int, *, is_eager: bool = False, num_blocks: int = 128
) -> AsyncEngine:
    executor = StepExecutor(
        decoder,
        StepLimits(
            block_size=16,
            num_slots=NUM_SLOTS,
            max_num_batched_tokens=512,
            max_model_len=MAX_MODEL_LEN,
            logits_tile_rows=NUM_SLOTS,
        ),
    )
    runner = CudaRunner(executor, is_eager=is_eager)
    runner.run_ahead_depth = depth
    runner.allocate_kv(num_blocks)
    scheduler = Scheduler(
        BlockManager(num_blocks, 16, enable_prefix_caching=False),
        SlotAllocator(NUM_SLOTS),
        max_num_batched_tokens=512,
        max_update_words=max_update_words(MAX_MODEL_LEN, 16),
        adapters=AdapterSlots(decoder.num_adapter_slots),
    )
    engine = Engine(
        scheduler, runner, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, policy="fcfs"
    )
    info = EngineInfo(
        max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, max_num_seqs=NUM_SLOTS, block_size=16,
        num_blocks=num_blocks, dtype="bfloat16", device="cuda",
    )  # fmt: skip
    return AsyncEngine(engine, info)


async def read_all(stream: SequenceStream) -> list[int]:
    token_ids: list[int] = []
    while True:
        delta = await stream.read()
        token_ids += delta.token_ids
        if delta.finish_reason is not None:
            return token_ids


async def generate(
    engine: AsyncEngine, adapters: Sequence[Adapter | None] = (None,)
) -> list[list[int]]:
    """Equal numbers of tokens, so that every step has the same rows at every depth."""
    generator = torch.Generator().manual_seed(4)
    engine.start()
    streams = []
    for number in range(NUM_SLOTS):
        prompt = torch.randint(VOCAB_SIZE, (5 + 7 * number,), generator=generator).tolist()
        temperature = 0.0 if number % 2 else 1.0
        params = SamplingParams(
            max_tokens=60, temperature=temperature, seed=number, frequency_penalty=0.2
        )
        adapter = adapters[number % len(adapters)]
        streams.append(engine.submit(SequenceRequest(prompt, params, adapter=adapter)))
    outputs = await asyncio.gather(*map(read_all, streams))
    assert engine.stats().num_blocks_used == 0
    await engine.stop()
    return outputs


def assert_replays(decoder: Decoder, adapters: Sequence[Adapter | None] = (None,)) -> None:
    """The same tokens op by op and recorded, awaited and run ahead of."""
    outputs = [
        asyncio.run(
            asyncio.wait_for(generate(engine_for(decoder, depth, is_eager=is_eager), adapters), 30)
        )
        for depth, is_eager in ((0, True), (0, False), (1, False))
    ]
    assert all(len(output) == 60 for output in outputs[0])
    assert outputs[1] == outputs[0] and outputs[2] == outputs[0]


def test_depths_give_the_same_tokens(decoder: Decoder) -> None:
    expected: list[list[int]] | None = None
    for depth in (0, 1, 2):
        outputs = asyncio.run(asyncio.wait_for(generate(engine_for(decoder, depth)), 30))
        assert all(len(output) == 60 and len(set(output)) > 10 for output in outputs)
        expected = expected or outputs
        assert outputs == expected, depth


def test_aborts_while_running_ahead_leave_the_others_alone(decoder: Decoder) -> None:
    async def test(num_aborted: int) -> list[list[int]]:
        engine = engine_for(decoder, 1)
        engine.start()
        params = SamplingParams(max_tokens=60, temperature=0.0)
        kept = [
            engine.submit(SequenceRequest([3, 1, 4, 1, 5, number], params)) for number in range(3)
        ]
        dropped = [engine.submit(SequenceRequest([9, 2, 6, number], params)) for number in range(5)]
        for stream in dropped[:num_aborted]:
            await stream.read()
            engine.abort(stream)
        outputs = await asyncio.gather(*map(read_all, kept))
        for stream in dropped[num_aborted:]:
            await read_all(stream)
        assert engine.stats().num_blocks_used == 0
        await engine.stop()
        return outputs

    # Fewer rows may round a near tie the other way: compare what came while all of them ran.
    whole, cut = (asyncio.run(asyncio.wait_for(test(count), 30)) for count in (0, 5))
    assert [output[:2] for output in whole] == [output[:2] for output in cut]
    assert all(len(output) == 60 for output in cut)
