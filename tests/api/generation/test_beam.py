"""Beam search over an engine: as written plainly, as transformers has it, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from pyserve.api.generation.beam import BeamGeneration, Search
from pyserve.api.generation.job import BeamSearch, Ending, Job, Prompt
from pyserve.client import Adapter, EngineClient, EngineInfo, SequenceRequest
from pyserve.engine.async_engine import AsyncEngine
from pyserve.errors import EngineError, QueueFullError, UnavailableError
from pyserve.metrics import Metrics
from pyserve.ops import build
from pyserve.params import SamplingParams
from pyserve.text.detokenizer import Detokenizer
from pyserve.text.parts import content_of
from pyserve.text.tokenizer import Tokenizer
from tests.api.fakes import Script
from tests.api.likely import Found, LikelyEngine, LogprobsOf, entry_of, made_up, plain_beam_search
from tests.engine.test_runner import make_decoder, make_engine
from tests.engine.tiny import CONFIG, VOCAB_SIZE
from tests.waiting import until

EOS = 2
PROMPTS = [[7, 8, 9, 10], [40, 41]]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(tokenizer_folder)


class Ids(Detokenizer):
    """Shows the ids of tokens in place of their text."""

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join(f"{token_id} " for token_id in token_ids)

    def flush(self) -> str:
        return ""


def make_job(
    tokenizer: Tokenizer, beam: BeamSearch, *, n: int, prompts: list[list[int]] = PROMPTS,
    is_stop_kept: bool = True, **params: Any,
) -> Job:  # fmt: skip
    own = SamplingParams(**{"max_tokens": 6, **params})
    return Job(
        prompts=[
            Prompt(ids, "", Ids(tokenizer, ids, skip_special_tokens=False)) for ids in prompts
        ],
        params=[own] * len(prompts),
        ending=Ending([], is_stop_kept, EOS, own.min_tokens),
        n=n,
        beam=beam,
    )


async def searched(
    engine: EngineClient, job: Job, *, user: str = "", adapter: Adapter | None = None
) -> BeamGeneration:
    """A search that has gone well."""
    generation = BeamGeneration(engine, Metrics("m"), arrived_s=0.0)
    try:
        await generation.submit(job, cache_salt="salt", user=user, adapter=adapter)
        await generation.read_all()
    finally:
        generation.close("error")
    return generation


def found_in(generation: BeamGeneration, job: Job) -> list[list[Found]]:
    """What the choices of each prompt show."""
    found: list[list[Found]] = [[] for _ in job.prompts]
    for choice in generation.shown():
        token_ids = [int(word) for word in content_of(choice.parts).split()]
        found[choice.index // job.n].append((0.0, token_ids, choice.finish_reason == "stop"))
        assert choice.num_tokens == len(token_ids)
    return found


def check(found: list[Found], wanted: list[Found]) -> None:
    assert [one[1:] for one in found] == [one[1:] for one in wanted]


def run(test: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(test, 60))


@pytest.mark.parametrize("length_penalty", [-2.0, 0.0, 1.0, 5.0])
@pytest.mark.parametrize(("width", "n"), [(1, 1), (3, 3), (10, 2)])
@pytest.mark.parametrize("min_tokens", [0, 3])
def test_as_written_plainly(
    tokenizer: Tokenizer, width: int, n: int, length_penalty: float, min_tokens: int
) -> None:
    logprobs_of = made_up(448, (EOS, 5))
    beam = BeamSearch(width, length_penalty)
    job = make_job(tokenizer, beam, n=n, stop_token_ids=(EOS, 5), min_tokens=min_tokens)
    engine = LikelyEngine(lambda number: Script([]), logprobs_of=logprobs_of)
    generation = run(searched(engine, job))
    found = found_in(generation, job)
    for prompt, own in zip(PROMPTS, found, strict=True):
        wanted = plain_beam_search(
            logprobs_of, prompt, width=width, n=n, max_tokens=6, ends=(EOS, 5),
            min_tokens=min_tokens, length_penalty=length_penalty,
        )  # fmt: skip
        check(own, wanted)
    assert {item.params.num_logprobs for item in engine.submitted} == {2 * width}
    assert generation.usage().prompt_tokens == 6
    assert generation.end == "finished"


def test_no_search_is_better_than_looking_at_everything() -> None:
    """With room for all sequences there are, the best of them come out."""
    logprobs_of, prompt, eos = made_up(3), [1, 2, 0], 2
    for length_penalty in (-1.0, 0.0, 1.0, 3.0):
        params = SamplingParams(max_tokens=3, stop_token_ids=(eos,))
        search = Search(BeamSearch(10, length_penalty), len(prompt), params, n=4)
        while not search.is_over:
            rows = [logprobs_of(prompt + beam.token_ids) for beam in search.live]
            search.advance([entry_of(row) for row in rows])
        scores: dict[tuple[int, ...], float] = {}
        for ids in product(range(3), repeat=3):
            stop = ids.index(eos) + 1 if eos in ids else 3
            sequence = ids[:stop]
            rows = [logprobs_of([*prompt, *sequence[:i]]) for i in range(stop)]
            total = sum(float(row[token]) for row, token in zip(rows, sequence, strict=True))
            length = len(prompt) + stop - (eos in ids)
            scores[sequence] = total / length**length_penalty
        best = sorted(scores, key=lambda sequence: -scores[sequence])[:4]
        assert [tuple(beam.token_ids) for beam in search.best()] == best
        assert [search.score(beam) for beam in search.best()] == pytest.approx(
            [scores[sequence] for sequence in best]
        )


def test_it_ends_as_soon_as_nothing_can_change() -> None:
    row = np.log(np.array([0.9, 0.05, 0.03, 0.02]))
    params = SamplingParams(max_tokens=1000, stop_token_ids=(0,))
    for length_penalty in (-1.0, 0.0, 0.1):
        search = Search(BeamSearch(2, length_penalty), 5, params, n=2)
        while not search.is_over:
            search.advance([entry_of(row)] * len(search.live))
        assert search.num_rounds < 10
        assert all(beam.stop_token_id == 0 for beam in search.best())
        assert len(search.ended) == 2  # however many have ended, no more are kept


def test_a_beam_keeps_the_logprobs_of_its_own_tokens(tokenizer: Tokenizer) -> None:
    logprobs_of, prompt = made_up(448, (EOS,)), PROMPTS[0]
    params = SamplingParams(max_tokens=5, stop_token_ids=(EOS,), num_logprobs=7)
    search = Search(BeamSearch(4, 1.0), len(prompt), params, n=4)
    while not search.is_over:
        rows = [logprobs_of(prompt + beam.token_ids) for beam in search.live]
        search.advance([entry_of(row) for row in rows])
    assert any(beam.token_ids[0] != search.best()[0].token_ids[0] for beam in search.best())
    for beam in search.best():
        for position, entry in enumerate(beam.logprobs):
            row = logprobs_of(prompt + beam.token_ids[:position])
            assert entry == entry_of(row, beam.token_ids[position]).best(7)
        total = sum(entry.logprob for entry in beam.logprobs)
        assert beam.cumulative_logprob == pytest.approx(total)


def test_the_stop_token_is_shown_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    texts = []
    for is_stop_kept in (False, True):
        job = make_job(
            tokenizer, BeamSearch(3, 1.0), n=3, prompts=PROMPTS[:1], is_stop_kept=is_stop_kept,
            stop_token_ids=(5,), max_tokens=3,
        )  # fmt: skip
        engine = LikelyEngine(lambda number: Script([]), logprobs_of=made_up(448, (5,)))
        generation = run(searched(engine, job))
        stopped = [c for c in generation.shown() if c.finish_reason == "stop"]
        assert stopped and all(c.stop_reason == 5 for c in stopped)
        texts.append([content_of(c.parts) for c in stopped])
    assert texts[1] == [f"{text}5 " for text in texts[0]]


def test_each_round_is_a_request_like_any_other(tokenizer: Tokenizer) -> None:
    job = make_job(tokenizer, BeamSearch(2, 1.0), n=1, prompts=PROMPTS[:1], max_tokens=3)
    engine = LikelyEngine(lambda number: Script([]), num_cached_tokens=3)
    adapter = Adapter("a", 1)
    generation = run(searched(engine, job, user="me", adapter=adapter))
    assert [len(item.prompt) for item in engine.submitted] == [4, 5, 5, 6, 6]
    assert {(item.user, item.cache_salt) for item in engine.submitted} == {("me", "salt")}
    assert {item.adapter for item in engine.submitted} == {adapter}
    (choice,) = generation.choices
    assert choice.stream.scheduled_s and choice.first_token_s
    usage = generation.usage()
    assert (usage.completion_tokens, usage.prompt_tokens_details.cached_tokens) == (3, 3)


def test_a_full_queue_is_waited_for_once_the_search_has_begun(tokenizer: Tokenizer) -> None:
    job = make_job(tokenizer, BeamSearch(2, 1.0), n=2, prompts=PROMPTS[:1], max_tokens=3)
    engine = LikelyEngine(lambda number: Script([]), full_from=2, num_full=3)
    found = found_in(run(searched(engine, job)), job)
    check(found[0], plain_beam_search(engine.logprobs_of, PROMPTS[0], width=2, n=2, max_tokens=3))
    assert engine.num_full == 0
    engine = LikelyEngine(lambda number: Script([]), full_from=0, num_full=1)
    with pytest.raises(QueueFullError):
        run(searched(engine, job))


def test_it_asks_for_room_for_all_beams(tokenizer: Tokenizer) -> None:
    job = make_job(tokenizer, BeamSearch(3, 1.0), n=1)
    engine = LikelyEngine(lambda number: Script([]), room=5)
    with pytest.raises(QueueFullError):
        run(searched(engine, job))
    assert engine.submitted == []


def test_a_step_that_fails_fails_the_request_and_frees_the_others(tokenizer: Tokenizer) -> None:
    job = make_job(tokenizer, BeamSearch(4, 1.0), n=1, prompts=PROMPTS[:1])
    error = EngineError("boom")
    engine = LikelyEngine(
        lambda number: Script([], error=error) if number == 3 else Script([], delay_s=0.2 * number)
    )
    with pytest.raises(EngineError, match="boom"):
        run(searched(engine, job))
    assert engine.running() == []
    assert sum(item.is_aborted for item in engine.submitted) == 3


def test_what_is_cancelled_frees_everything(tokenizer: Tokenizer) -> None:
    job = make_job(tokenizer, BeamSearch(4, 1.0), n=2, max_tokens=100)
    engine = LikelyEngine(lambda number: Script([], delay_s=0.01))
    metrics = Metrics("m")

    async def leave() -> BeamGeneration:
        generation = BeamGeneration(engine, metrics, arrived_s=0.0)
        await generation.submit(job, cache_salt="", user="")
        task = asyncio.get_running_loop().create_task(generation.read_all())
        await until(lambda: len(engine.submitted) >= 20)
        task.cancel()
        generation.close("abort")
        generation.close("abort")
        assert engine.running() == []
        num_submitted = len(engine.submitted)
        await asyncio.sleep(0.05)
        assert len(engine.submitted) == num_submitted
        return generation

    generation = run(leave())
    assert generation.end == "aborted"
    assert [choice.finish_reason for choice in generation.choices] == ["abort"] * 4
    assert metrics.num_requests == {"finished": 0, "aborted": 1, "failed": 0}


def test_a_request_that_takes_too_long_ends(tokenizer: Tokenizer) -> None:
    job = make_job(tokenizer, BeamSearch(2, 1.0), n=1, max_tokens=1000)

    async def interrupt() -> None:
        engine = LikelyEngine(lambda number: Script([], delay_s=0.01))
        generation = BeamGeneration(engine, Metrics("m"), arrived_s=0.0)
        await generation.submit(job, cache_salt="", user="")
        error = UnavailableError("the request has taken longer than 1 s")
        asyncio.get_running_loop().call_later(0.1, generation.interrupt, error)
        with pytest.raises(UnavailableError, match="longer than"):
            await generation.read_all()
        assert generation.error is error
        generation.close("error")
        assert engine.running() == []

    run(interrupt())


@pytest.fixture(scope="module")
def oracle() -> Iterator[LlamaForCausalLM]:
    """The weights of the tiny model in transformers."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    build.load_native(is_reference_allowed=True, progress=lambda line: None)
    fields = {k: v for k, v in CONFIG.items() if k not in ("architectures", "torch_dtype")}
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    weights = {name: place.view for name, place in make_decoder().destinations().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing and not unexpected
    yield model
    torch.set_num_threads(num_threads)


def told_by(model: LlamaForCausalLM) -> LogprobsOf:
    @torch.inference_mode()
    def logprobs_of(token_ids: list[int]) -> NDArray[np.float64]:
        row = model(torch.tensor([token_ids])).logits[0, -1].double().log_softmax(-1)
        return np.asarray(row.numpy(), np.float64)

    return logprobs_of


def search_model(job: Job, *, caching: bool) -> list[list[Found]]:
    info = EngineInfo(
        max_model_len=256, vocab_size=VOCAB_SIZE, max_num_seqs=8, block_size=4, num_blocks=128,
        dtype="float32", device="cpu",
    )  # fmt: skip

    async def search() -> list[list[Found]]:
        inner = make_engine(make_decoder(), caching=caching)
        engine = AsyncEngine(inner, info)
        engine.start()
        try:
            found = found_in(await searched(engine, job), job)
            inner.check_invariants()
            stats = engine.stats()
            assert (stats.num_running, stats.num_waiting) == (0, 0)
            assert (stats.cached_tokens > stats.prompt_tokens / 3) == caching
        finally:
            await engine.stop()
        return found

    found: list[list[Found]] = run(search())
    return found


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no caching"])
def test_on_a_model_as_written_plainly_over_transformers(
    tokenizer: Tokenizer, oracle: LlamaForCausalLM, caching: bool
) -> None:
    prompts = [list(range(3, 40)), [5, 90, 17]]
    ends = (11, 30, 60)
    job = make_job(
        tokenizer, BeamSearch(4, 0.8), n=3, prompts=prompts, max_tokens=12, min_tokens=2,
        stop_token_ids=ends,
    )  # fmt: skip
    found = search_model(job, caching=caching)
    for prompt, own in zip(prompts, found, strict=True):
        wanted = plain_beam_search(
            told_by(oracle), prompt, width=4, n=3, max_tokens=12, ends=ends, min_tokens=2,
            length_penalty=0.8,
        )  # fmt: skip
        check(own, wanted)


def test_on_a_model_as_transformers_searches(
    tokenizer: Tokenizer, oracle: LlamaForCausalLM
) -> None:
    prompt = [3, 14, 15, 92, 65]
    job = make_job(tokenizer, BeamSearch(4, 1.0), n=4, prompts=[prompt], max_tokens=24)
    found = search_model(job, caching=True)
    sequences = oracle.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), num_beams=4,
        num_return_sequences=4, max_new_tokens=24, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert [one[1] for one in found[0]] == sequences[:, len(prompt) :].tolist()


def test_a_neighbour_is_served_meanwhile_and_leaving_frees_the_blocks(tokenizer: Tokenizer) -> None:
    """With more beams than slots, of one user, beside an answer of another."""
    build.load_native(is_reference_allowed=True, progress=lambda line: None)
    info = EngineInfo(
        max_model_len=256, vocab_size=VOCAB_SIZE, max_num_seqs=8, block_size=4, num_blocks=128,
        dtype="float32", device="cpu",
    )  # fmt: skip
    prompts = [[number, 4, 5] for number in range(3)]
    job = make_job(tokenizer, BeamSearch(10, 1.0), n=10, prompts=prompts, max_tokens=200)

    async def search() -> None:
        inner = make_engine(make_decoder(), caching=True)
        engine = AsyncEngine(inner, info)
        engine.start()
        task = asyncio.get_running_loop().create_task(searched(engine, job, user="searcher"))
        await until(lambda: inner.num_finished >= 30, pause_s=0.001)
        before = inner.num_finished
        params = SamplingParams(max_tokens=12, temperature=0.0)
        stream = engine.submit(SequenceRequest([9, 8, 7], params, user="other"))
        while not stream.is_finished:
            await stream.read()
        # Of 8 slots it has one at once: 12 steps of 7 sequences that take a step each.
        assert inner.num_finished - before < 12 * 8 * 2
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not engine.stats().num_running + engine.stats().num_blocks_used)
        inner.check_invariants()
        await engine.stop()

    run(search())
