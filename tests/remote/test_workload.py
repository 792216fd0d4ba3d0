"""What is asked is the same in every process, and is sent when it should be."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from bench.stub import MODEL, StubConfig, running_stub
from pyserve.remote.workload import LoadSpec, arrival_times, build_request, run_load

SPEC = LoadSpec(url="http://127.0.0.1:1", models=(MODEL,))


def vary(**fields: object) -> LoadSpec:
    return msgspec.structs.replace(SPEC, **fields)


def test_a_request_is_a_function_of_seed_and_number() -> None:
    spec = vary(input_len=(5, 50), output_len=(1, 9), vocab_size=100, shared_prefix_len=4)
    bodies = [build_request(spec, number)[1] for number in range(400)]
    assert bodies == [build_request(spec, number)[1] for number in range(400)]
    assert {len(body["prompt"]) for body in bodies} == set(range(5, 51))
    assert {body["max_tokens"] for body in bodies} == set(range(1, 10))
    assert len({tuple(body["prompt"][:4]) for body in bodies}) == 1
    assert len({tuple(body["prompt"][4:]) for body in bodies}) > 390
    assert all(0 <= token < 100 for body in bodies for token in body["prompt"])
    assert build_request(vary(seed=1), 0)[1]["prompt"] != build_request(SPEC, 0)[1]["prompt"]


def test_chat_and_text_requests() -> None:
    path, body = build_request(vary(is_chat=True, input_len=(7, 7)), 0)
    assert path == "/v1/chat/completions"
    assert len(body["messages"][0]["content"].split()) == 7
    path, body = build_request(vary(is_text=True, input_len=(7, 7)), 0)
    assert path == "/v1/completions" and len(body["prompt"].split()) == 7


def test_fields_can_be_added_and_overridden() -> None:
    spec = vary(extra_body={"top_k": 5, "max_tokens": 3}, ignore_eos=False)
    body = build_request(spec, 0)[1]
    assert body["top_k"] == 5 and body["max_tokens"] == 3 and "ignore_eos" not in body


def test_usage_in_every_frame_is_asked_for_on_demand() -> None:
    asked = [build_request(vary(has_continuous_usage=flag), 0)[1] for flag in (False, True)]
    options = [body["stream_options"] for body in asked]
    assert options[0] == {"include_usage": True}
    assert options[1] == {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize(
    ("config", "fields", "gap_tokens"),
    [
        (StubConfig(), {}, [1] * 9),
        (StubConfig(held_frame=2), {}, [1, 2, 1, 1, 1, 1, 1, 1]),
        (StubConfig(held_frame=2), {"is_chat": True}, [1, 2, 1, 1, 1, 1, 1, 1]),
        (StubConfig(held_frame=0), {}, [1] * 8),  # no gap ends in the first frame
        (StubConfig(tokens_per_frame=4), {}, [4, 2]),
        (StubConfig(tokens_per_frame=10), {}, []),
        (StubConfig(held_frame=2), {"has_continuous_usage": False}, []),
        (StubConfig(has_usage=False), {}, []),
        (StubConfig(), {"extra_body": {"n": 2}}, []),
    ],
)
def test_tokens_of_each_gap(
    config: StubConfig, fields: dict[str, object], gap_tokens: list[int]
) -> None:
    with running_stub(config) as (url, _):
        spec = vary(url=url, num_requests=1, output_len=(10, 10), has_continuous_usage=True)
        (report,) = run_load(msgspec.structs.replace(spec, **fields), 1)
    (record,) = report.records
    assert record.error is None and record.gap_tokens == gap_tokens
    assert not gap_tokens or len(record.gaps) == len(gap_tokens)


def test_arrivals_are_poisson() -> None:
    times = arrival_times(vary(request_rate=50.0, num_requests=20_000))
    gaps = np.diff(times)
    assert times[0] == 0.0
    assert abs(gaps.mean() * 50.0 - 1) < 0.03
    assert abs(gaps.std() * 50.0 - 1) < 0.05  # of an exponential: its mean


def test_closed_loop_over_processes() -> None:
    with running_stub() as (url, stub):
        spec = vary(url=url, num_requests=25, concurrency=5, output_len=(4, 4))
        reports = run_load(spec, 2)
    records = [record for report in reports for record in report.records]
    assert len(reports) == 2
    assert sorted(record.number for record in records) == list(range(25))
    assert all(record.error is None and record.num_output_tokens == 4 for record in records)
    assert all(len(record.gaps) == 3 for record in records)
    assert stub.num_requests == 25
    assert count_overlaps(records) <= 5


def test_open_loop_keeps_its_arrivals_however_slow_the_server() -> None:
    with running_stub(StubConfig(delay_s=0.2)) as (url, _):
        spec = vary(url=url, num_requests=20, request_rate=100.0, output_len=(2, 2), seed=3)
        (report,) = run_load(spec, 1)
    records = sorted(report.records, key=lambda record: record.number)
    started = np.array([record.started_s for record in records])
    np.testing.assert_allclose(started - started[0], arrival_times(spec), atol=1e-6)
    assert count_overlaps(records) > 5
    assert max(record.late_s for record in records) < 2.0  # one after the other: 8 s


def count_overlaps(records: list) -> int:  # type: ignore[type-arg]
    events = [(r.started_s, 1) for r in records] + [(r.ended_s, -1) for r in records]
    return int(np.cumsum([step for _, step in sorted(events)]).max())
