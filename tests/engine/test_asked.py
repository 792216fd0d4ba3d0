"""Logprobs of sampled tokens and of prompts, against transformers in float32, whatever happens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pyserve.client import SequenceRequest, SequenceStream, TokenLogprobs
from pyserve.config import LogprobsMode
from pyserve.engine.batch import NOTHING_ASKED
from pyserve.limits import TOP_LOGPROBS
from pyserve.model.decoder import Decoder
from pyserve.params import SamplingParams
from tests.engine.constraints import Scripted, windows
from tests.engine.driver import Driver, Reader
from tests.engine.test_runner import NAN_TOKEN, decoder, make_engine, requests, threads
from tests.engine.tiny import CONFIG, VOCAB_SIZE

__all__ = ["decoder", "threads"]  # fixtures


@dataclass
class Told(Reader):
    """A reader that keeps the logprobs, too."""

    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def take(self) -> None:
        while not self.is_finished and (delta := self.stream.take()) is not None:
            self.output += delta.token_ids
            assert (delta.logprobs is None) == (self.params.num_logprobs is None)
            assert delta.logprobs is None or len(delta.logprobs) == len(delta.token_ids)
            self.logprobs += delta.logprobs or []
            self.finish_reason = delta.finish_reason


def told(driver: Driver, prompt: list[int], params: SamplingParams, **kwargs: Any) -> Told:
    """A sequence that is asked for everything."""
    params = asking(params)
    reader = driver.submit(prompt, params, **kwargs)
    mine = Told(prompt, params, reader.stream, reader.constraint)
    driver.readers[-1] = mine
    return mine


def asking(params: SamplingParams) -> SamplingParams:
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**{**fields, "num_logprobs": 20, "num_prompt_logprobs": 3})


@pytest.fixture(scope="module")
def oracle(decoder: Decoder) -> LlamaForCausalLM:
    """The same weights in transformers."""
    fields = {k: v for k, v in CONFIG.items() if k not in ("architectures", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    weights = {name: place.view for name, place in decoder.destinations().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    return model


@torch.inference_mode()
def check(oracle: LlamaForCausalLM, reader: Told, *, has_logits: bool = False) -> None:
    token_ids = torch.tensor([reader.prompt + reader.output])
    exact = oracle(token_ids).logits[0].double()
    if not has_logits:
        exact = exact.log_softmax(-1)
    prompt = reader.stream.prompt_logprobs
    assert len(prompt) == len(reader.prompt) - 1
    assert len(reader.logprobs) == len(reader.output)
    for position, entry in enumerate([*prompt, *reader.logprobs]):
        row, token_id = exact[position], int(token_ids[0, position + 1])
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=2e-4)
        closest = (row - row[token_id]).abs().sort().values[1]
        if closest > 1e-4:
            assert entry.token_rank == 1 + int((row > row[token_id]).sum())
        num_top = 3 if position < len(prompt) else TOP_LOGPROBS
        best = row.topk(num_top)
        assert entry.top_logprobs == pytest.approx(best.values.tolist(), abs=2e-4)
        assert row[entry.top_ids].tolist() == pytest.approx(best.values.tolist(), abs=2e-4)
        assert len(set(entry.top_ids)) == num_top


EVERYTHING = {"num_blocks": 17, "budget": 11, "caching": True, "logits_tile_rows": 1}


@pytest.mark.parametrize(
    ("settings", "depth"),
    [({}, 1), ({"budget": 9}, 0), ({"logits_tile_rows": 3}, 1), ({"caching": True}, 0),
     (EVERYTHING, 0), (EVERYTHING, 1)],
    ids=["batch", "chunks", "tiles", "caching", "everything", "everything ahead"],
)  # fmt: skip
def test_as_transformers_has_it(
    settings: dict[str, int], depth: int, decoder: Decoder, oracle: LlamaForCausalLM
) -> None:
    engine = make_engine(decoder, **settings)  # type: ignore[arg-type]
    driver = Driver(engine, depth)
    readers = [
        told(driver, prompt, params) if number % 3 else driver.submit(prompt, params)
        for number, (prompt, params) in enumerate(requests())
    ]
    driver.drain()
    engine.check_invariants()
    engine.runner.close()
    assert (engine.scheduler.num_preemptions > 0) == ("num_blocks" in settings)
    for reader in readers:
        if isinstance(reader, Told):
            check(oracle, reader)
            assert reader.stream.num_cached_tokens == 0
        else:
            assert not reader.stream.prompt_logprobs


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits"])
def test_they_are_those_before_masks_biases_and_penalties(
    decoder: Decoder, oracle: LlamaForCausalLM, mode: LogprobsMode
) -> None:
    for tile_rows in (1, 64):
        engine = make_engine(decoder, logits_tile_rows=tile_rows, logprobs_mode=mode)
        driver = Driver(engine, 1)
        params = SamplingParams(
            max_tokens=20, temperature=0.5, seed=1, logit_bias={3: 9.0}, frequency_penalty=1.0
        )
        rule = windows(VOCAB_SIZE, 9)
        readers = [
            told(driver, [7, i, 5], params, constraint=Scripted(rule) if i % 2 else None)
            for i in range(4)
        ]
        driver.drain()
        engine.runner.close()
        for reader in readers:
            check(oracle, reader, has_logits=mode == "raw_logits")
        assert any(entry.token_rank > 5 for reader in readers for entry in reader.logprobs)


def processed(row: torch.Tensor, reader: Told, num_output: int) -> torch.Tensor:
    """What the token behind so many of the output is drawn from, of the model's logits `row`."""
    params, output = reader.params, reader.output[:num_output]
    if isinstance(reader.constraint, Scripted):
        allowed = reader.constraint.rule(output)
        for token_id in range(VOCAB_SIZE):
            if allowed is not None and token_id not in allowed:
                row[token_id] = -torch.inf
    for token_id, bias in params.logit_bias.items():
        row[token_id] += bias
    if num_output < params.min_tokens:
        row[list(params.stop_token_ids)] = -torch.inf
    for token_id in {*reader.prompt, *output}:
        factor = params.repetition_penalty
        row[token_id] *= factor if row[token_id] < 0 else 1 / factor
    for token_id in set(output):
        row[token_id] -= params.presence_penalty
        row[token_id] -= params.frequency_penalty * output.count(token_id)
    if params.temperature == 0.0:
        return row
    row /= params.temperature
    if params.top_k:
        row[row < row.topk(params.top_k).values[-1]] = -torch.inf
    likely = row.softmax(-1)
    row[likely < params.min_p * likely.max()] = -torch.inf
    mass, order = row.softmax(-1).sort(descending=True)
    row[order[mass.cumsum(-1) - mass >= params.top_p]] = -torch.inf
    return row


@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits"])
def test_the_processed_ones_are_what_is_drawn_from(
    decoder: Decoder, oracle: LlamaForCausalLM, mode: LogprobsMode
) -> None:
    engine = make_engine(decoder, logits_tile_rows=3, logprobs_mode=mode)
    driver = Driver(engine, 1)
    masked = Scripted(windows(VOCAB_SIZE, 9))
    readers = [
        told(driver, prompt, params, constraint=masked if number == 1 else None)
        for number, (prompt, params) in enumerate(requests())
    ]
    driver.drain()
    engine.runner.close()
    num_left_out = 0
    for reader in readers:
        with torch.inference_mode():
            logits = oracle(torch.tensor([reader.prompt + reader.output])).logits[0].double()
        for at, entry in enumerate(reader.logprobs):
            row = processed(logits[len(reader.prompt) - 1 + at].clone(), reader, at)
            if mode == "processed_logprobs":
                row = row.log_softmax(-1)
            assert entry.logprob == pytest.approx(float(row[reader.output[at]]), abs=2e-4)
            best = row.topk(TOP_LOGPROBS).values.tolist()
            assert entry.top_logprobs == pytest.approx(best, abs=2e-4)
            num_left_out += best[-1] == -torch.inf
        # Nothing is done to a prompt's: nothing is drawn there.
        exact = logits if mode == "processed_logits" else logits.log_softmax(-1)
        for at, entry in enumerate(reader.stream.prompt_logprobs):
            assert entry.logprob == pytest.approx(float(exact[at, reader.prompt[at + 1]]), abs=2e-4)
    assert num_left_out > 50


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_asking_changes_no_token(decoder: Decoder, mode: LogprobsMode) -> None:
    outputs = []
    for asks in (False, True):
        engine = make_engine(decoder, logprobs_mode=mode)
        driver = Driver(engine, 0)
        for prompt, params in requests():
            driver.submit(prompt, asking(params) if asks else params)
        driver.drain()
        engine.runner.close()
        outputs.append([reader.output for reader in driver.readers])
    assert outputs[0] == outputs[1]


def test_a_step_that_nobody_asks_holds_nothing(decoder: Decoder) -> None:
    engine = make_engine(decoder)
    stream = engine.add(SequenceRequest([1, 2, 3], asking(SamplingParams(max_tokens=9))))
    step = engine.schedule()
    assert step is not None
    assert step.asked == ([0], [0, 1], [2, 3])
    engine.update(step, engine.runner.run(step))
    engine.abort(stream)
    engine.add(SequenceRequest([1, 2, 3], SamplingParams(max_tokens=2)))
    step = engine.schedule()
    assert step is not None
    assert step.asked is NOTHING_ASKED and step.prompt_spans == []
    output = engine.runner.run(step)
    assert output.logprobs is None and output.prompt_logprobs is None
    engine.runner.close()


def test_nan_fails_its_row_alone(decoder: Decoder, oracle: LlamaForCausalLM) -> None:
    embedding = decoder.destinations()["model.embed_tokens.weight"].view
    before = embedding[NAN_TOKEN].clone()
    embedding[NAN_TOKEN] = torch.nan
    try:
        engine = make_engine(decoder)
        driver = Driver(engine, 1)
        params = SamplingParams(max_tokens=8, temperature=0.0, logit_bias={NAN_TOKEN: -100.0})
        bad = driver.submit([3, NAN_TOKEN, 4], asking(params))
        good = told(driver, [3, 14, 4], params)
        driver.drain()
        engine.runner.close()
    finally:
        embedding[NAN_TOKEN] = before
    assert "not a number" in str(bad.error)
    check(oracle, good)


def test_a_stream_gives_them_with_their_tokens() -> None:
    async def run() -> None:
        entry = TokenLogprobs(-1.0, 2, [5], [-0.5])
        from_engine = Told([1], SamplingParams(max_tokens=5, num_logprobs=1), SequenceStream(0, 1))
        from_engine.stream.put([4], [entry])
        from_engine.stream.put([5], [entry])
        delta = await from_engine.stream.read()
        assert delta.token_ids == [4, 5] and delta.logprobs == [entry, entry]
        from_engine.stream.put([6], [entry])
        from_engine.stream.finish("length")
        delta = await from_engine.stream.read()
        assert delta.token_ids == [6] and delta.logprobs == [entry]
        assert (await from_engine.stream.read()).logprobs is None

    asyncio.run(run())
