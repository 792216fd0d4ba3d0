"""Grammars in the engine, with random weights at temperature 1: every whole answer is valid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import jsonschema
import pytest
import torch

from pyserve.client import Constraint, SequenceRequest, SequenceStream
from pyserve.constraints import all_of
from pyserve.engine.batch import max_update_words
from pyserve.engine.block_manager import BlockManager
from pyserve.engine.cpu_runner import CpuRunner
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
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.grammar import JsonSchema, Regex, compile_grammar
from pyserve.text.reasoning import ReasoningParser
from pyserve.text.thinking_budget import ThinkingBudget
from tests.engine.driver import Driver
from tests.engine.tiny import CONFIG
from tests.text.grammars import vocabulary

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["cat", "dog", None, 7]},
        "age": {"type": "integer", "minimum": 3, "maximum": 40},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
    },
    "required": ["kind", "age", "tags", "zip"],
    "additionalProperties": False,
}
PATTERN = "(yes|no)( [a-z]{2,4}){1,3}!"
NUM_SLOTS, BLOCK_SIZE, MAX_MODEL_LEN = 8, 16, 256


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    config = ModelConfig.from_hf(CONFIG | {"vocab_size": vocabulary().vocab_size})
    yield load_model(
        tmp_path_factory.mktemp("grammars"), config,
        Placement(torch.float32, torch.device("cpu")),
        load_format="dummy", seed=0, progress=lambda done, total: None,
    )  # fmt: skip


def make_driver(decoder: Decoder, depth: int, num_blocks: int) -> Driver:
    limits = StepLimits(
        block_size=BLOCK_SIZE, num_slots=NUM_SLOTS, max_num_batched_tokens=64,
        max_model_len=MAX_MODEL_LEN, logits_tile_rows=3,
    )  # fmt: skip
    executor = StepExecutor(decoder, limits)
    executor.allocate_kv(num_blocks)
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK_SIZE, enable_prefix_caching=True),
        SlotAllocator(NUM_SLOTS),
        max_num_batched_tokens=64,
        max_update_words=max_update_words(MAX_MODEL_LEN, BLOCK_SIZE),
    )
    engine = Engine(
        scheduler, CpuRunner(executor, num_threads=1), max_model_len=MAX_MODEL_LEN,
        vocab_size=vocabulary().vocab_size, policy="fcfs",
    )  # fmt: skip
    return Driver(engine, depth)


class Run:
    """Sequences of one engine, each with a constraint that is not one of the tests' own."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.streams: list[SequenceStream] = []

    def add(self, seed: int, constraint: Constraint | None, **fields: Any) -> None:
        params = SamplingParams(
            **{"max_tokens": 100, "seed": seed, **fields},
            stop_token_ids=tuple(vocabulary().eos_token_ids),
        )
        request = SequenceRequest([5 + seed] * (4 + 3 * seed), params, constraint=constraint)
        self.streams.append(self.driver.engine.add(request))

    def texts(self) -> Iterator[tuple[str, str | None]]:
        """Text and reason of each, without its stop token."""
        self.driver.drain()
        self.driver.engine.check_invariants()
        self.driver.engine.runner.close()
        for stream in self.streams:
            delta = stream.take()
            assert delta is not None
            ids = delta.token_ids[:-1] if delta.stop_token_id is not None else delta.token_ids
            tokenizer = vocabulary().tokenizer
            yield tokenizer.decode(ids, skip_special_tokens=False), delta.finish_reason


@pytest.mark.parametrize("num_blocks", [128, 24])
@pytest.mark.parametrize("depth", [0, 1])
def test_answers_are_valid(decoder: Decoder, depth: int, num_blocks: int) -> None:
    run = Run(make_driver(decoder, depth, num_blocks))
    schema = compile_grammar(JsonSchema(param="x", schema=SCHEMA, whitespace=""), vocabulary())
    pattern = compile_grammar(Regex(param="x", pattern=PATTERN), vocabulary())
    for number in range(12):
        constraint = (None, schema.constraint(), pattern.constraint())[number % 3]
        run.add(number, constraint, min_tokens=40 if constraint is None else 0)
    for number, (text, reason) in enumerate(run.texts()):
        if number % 3 == 0:
            continue
        assert reason == "stop", text
        if number % 3 == 1:
            jsonschema.validate(json.loads(text), SCHEMA)
        else:
            kind, *words = text.removesuffix("!").split(" ")
            assert kind in ("yes", "no") and 1 <= len(words) <= 3 and text.endswith("!")
    assert (run.driver.engine.scheduler.num_preemptions > 0) == (num_blocks == 24)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_grammar_behind_thinking_of_a_bounded_length(decoder: Decoder, depth: int) -> None:
    """Free while it thinks, closed by force, then valid: three constraints on one answer."""
    tokenizer = vocabulary().tokenizer
    parser = ReasoningParser("deepseek_r1", tokenizer)
    (end,) = parser.format.ends
    end_ids = tokenizer.encode(end, add_special_tokens=False)
    detokenizer = Detokenizer(tokenizer, [5], skip_special_tokens=True, shown=parser.marker_ids)
    compiled = compile_grammar(Regex(param="x", pattern=PATTERN), vocabulary())
    bad = tuple(tokenizer.encode("no e", add_special_tokens=False))
    run = Run(make_driver(decoder, depth, 128))
    for number in range(8):
        budget = ThinkingBudget(2 * number, partial(parser.stage, "open"), detokenizer, end_ids)
        grammar = compiled.constraint(free_until=parser.free_until("open"))
        run.add(
            number, all_of([budget, grammar]), bad_words=(bad,),
            min_tokens=2 * number,
        )  # fmt: skip
    for number, (text, reason) in enumerate(run.texts()):
        thought, found, answer = text.partition(end)
        assert found and reason == "stop", text
        assert bool(thought) == (number > 0)
        assert answer.endswith("!") and answer.split(" ")[0] in ("yes", "no")
        ids = tokenizer.encode(answer, add_special_tokens=False)
        assert bad != tuple(ids[: len(bad)])


@pytest.mark.parametrize("num_blocks", [128, 24])
@pytest.mark.parametrize("depth", [0, 1])
def test_an_answer_that_would_end_while_it_thinks_is_given_all_the_same(
    decoder: Decoder, depth: int, num_blocks: int
) -> None:
    """The end is likely at each token, or never comes; then they think until they are cut off."""
    tokenizer = vocabulary().tokenizer
    parser = ReasoningParser("deepseek_r1", tokenizer)
    (end,) = parser.format.ends
    compiled = compile_grammar(Regex(param="x", pattern=PATTERN), vocabulary())
    ends = vocabulary().eos_token_ids
    run = Run(make_driver(decoder, depth, num_blocks))
    for number in range(12):
        likely = dict.fromkeys(ends, 6.0 if number % 4 else -100.0)
        constraint = compiled.constraint(free_until=parser.free_until("open"))
        run.add(number, constraint, logit_bias=likely)
    for number, (text, reason) in enumerate(run.texts()):
        thought, found, answer = text.partition(end)
        if number % 4 == 0:
            assert reason == "length" and not found
            continue
        assert found and reason == "stop", text
        assert thought.endswith(tuple(str(tokenizer.id_to_token(token_id)) for token_id in ends))
        assert answer.endswith("!") and answer.split(" ")[0] in ("yes", "no")
