"""HTTP requests by route: few series, whatever is asked."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.api.fakes import MODEL, Server, run_server
from tests.waiting import wait_until

ROOT_PATH = "/llm"
COMPLETIONS = "/v1/completions"
COUNTS = "http_requests_total"
DURATIONS = "http_request_duration_seconds_count"


def test_requests_are_counted_by_template_method_and_class_of_status(
    tokenizer_folder: Path,
) -> None:
    with run_server(tokenizer_folder, root_path=ROOT_PATH) as server:
        server.play("Hello")
        body = {"prompt": "a", "max_tokens": 4}
        server.post(COMPLETIONS, body)
        server.frames(f"{ROOT_PATH}{COMPLETIONS}/", body)
        assert server.request("POST", COMPLETIONS, {"prompt": 1})[0] == 400
        for path in (f"/v1/models/{MODEL}", f"{ROOT_PATH}/v1/models/other", "/v1/models/x/y"):
            server.request("GET", path)
        for path in ("/wp-login.php", "/{model}", f"{ROOT_PATH}/.env"):
            assert server.request("GET", path)[0] == 404
        assert server.request("PROPFIND", COMPLETIONS)[0] == 405
        for path in ("/health", "/load", f"{ROOT_PATH}/metrics", "/version/"):
            assert server.request("GET", path)[0] == 200
        expected = {
            (COMPLETIONS, "POST", "2xx"): 2,
            (COMPLETIONS, "POST", "4xx"): 1,
            ("/v1/models/{model}", "GET", "2xx"): 1,
            ("/v1/models/{model}", "GET", "4xx"): 2,
            ("none", "GET", "4xx"): 3,
            ("none", "other", "4xx"): 1,
        }
        # The last bytes of an answer may come before its end is noted.
        wait_until(lambda: _labelled(server, COUNTS, "handler", "method", "status") == expected)
        assert _labelled(server, DURATIONS, "handler", "method")[COMPLETIONS, "POST"] == 3
        assert _labelled(server, "http_request_duration_highr_seconds_count") == {(): 10}


def test_a_client_that_goes_before_its_answer_is_counted(server: Server) -> None:
    key = (COMPLETIONS, "POST", "4xx")
    before = _labelled(server, COUNTS, "handler", "method", "status").get(key, 0)
    server.play("Hello", starts=False)
    server.connect(COMPLETIONS, {"prompt": "a"}).close()
    wait_until(
        lambda: _labelled(server, COUNTS, "handler", "method", "status").get(key, 0) == before + 1
    )


def _labelled(server: Server, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    text = server.request("GET", "/metrics")[2].decode()
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }
