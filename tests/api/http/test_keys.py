"""Who asks, by key: each has a prefix cache of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from aiohttp.test_utils import make_mocked_request
from prometheus_client.parser import text_string_to_metric_families

from pyserve.api.http.keys import Keys
from tests.api.fakes import MODEL, run_server

KEYS = (("alice", "one"), ("alice", "uno"), ("key-3", "two"))
BODY = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}


@pytest.mark.parametrize(
    ("headers", "user"),
    [
        ({"Authorization": "Bearer one"}, "alice"),
        ({"Authorization": "Bearer uno"}, "alice"),
        ({"Authorization": "bearer  two "}, "key-3"),
        ({"X-Api-Key": "two"}, "key-3"),
        ({"Authorization": "Bearer two", "X-Api-Key": "one"}, "key-3"),
        ({"Authorization": "Bearer wrong", "X-Api-Key": "one"}, "alice"),
        ({"Authorization": "Bearer alice"}, None),  # a name is no key
        ({"Authorization": "Bearer alice=one"}, None),
        ({"Authorization": "Bearer on"}, None),  # a key's beginning is not the key
        ({"Authorization": "Bearer one!"}, None),
        ({"Authorization": "Basic one"}, None),
        ({}, None),
    ],
)
def test_a_key_tells_the_user(headers: dict[str, str], user: str | None) -> None:
    keys = Keys(KEYS)
    assert keys.users == ("alice", "key-3")
    assert keys.user(make_mocked_request("GET", "/", headers=headers)) == user


def test_without_keys_everybody_is_one_user() -> None:
    assert Keys(()).user(make_mocked_request("GET", "/")) == ""


@pytest.mark.parametrize(
    ("keys", "is_shared", "num_salts"),
    [
        (("a", "b"), False, 2),
        (("a", "b"), True, 1),
        (("u=a", "v=b"), False, 2),
        (("u=a", "u=b"), False, 1),  # one user
    ],
)
def test_users_do_not_share_the_prefix_cache_unless_told_to(
    tokenizer_folder: Path, keys: tuple[str, ...], is_shared: bool, num_salts: int
) -> None:
    """300 requests and `cached_tokens` were enough to learn what another user had asked."""
    with run_server(tokenizer_folder, api_keys=keys, share_prefix_cache=is_shared) as server:
        server.play("x")
        salts: dict[str, set[str]] = {}
        for key in keys:
            for asked in ({}, {"cache_salt": "mine"}):
                headers = {"Authorization": f"Bearer {key.rpartition('=')[2]}"}
                status, _, reply = server.request(
                    "POST", "/v1/completions", {**BODY, **asked}, headers
                )
                assert status == 200, reply
                salt = server.engine.submitted[-1].cache_salt
                salts.setdefault(asked.get("cache_salt", ""), set()).add(salt)
        assert {asked: len(found) for asked, found in salts.items()} == {
            "": num_salts, "mine": num_salts,
        }  # fmt: skip
        assert not salts[""] & salts["mine"]


def test_nobody_gets_another_user_s_salt_by_asking_for_it(tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder, api_keys=("a", "b")) as server:
        server.play("x")
        for key, asked in (("a", ""), ("b", "key-1\0"), ("b", "")):
            body = {**BODY, **({"cache_salt": asked} if asked else {})}
            server.request("POST", "/v1/completions", body, {"Authorization": f"Bearer {key}"})
        assert len({item.cache_salt for item in server.engine.submitted}) == 3


def test_one_key_and_none_share_what_clients_ask_for(tokenizer_folder: Path) -> None:
    for keys in ((), ("a",)):
        with run_server(tokenizer_folder, api_keys=keys) as server:
            server.play("x")
            headers = {"Authorization": "Bearer a"}
            assert server.request("POST", "/v1/completions", BODY, headers)[0] == 200
            assert server.engine.submitted[-1].cache_salt == ""


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),  # a Unix socket
    ],
)
def test_a_client_is_an_address_where_all_have_one_key(address: str, client: str) -> None:
    request = make_mocked_request("GET", "/", headers={"X-Forwarded-For": "203.0.113.1"})
    request = request.clone(remote=address)
    for keys in (Keys(()), Keys(KEYS[2:]), Keys(KEYS[:2])):  # two keys of one user
        assert keys.client(request, "1") == client
    assert Keys(KEYS).client(request, "2") == "2"


def test_the_engine_is_told_whose_a_sequence_is(tokenizer_folder: Path) -> None:
    for keys, users in (((), ["127.0.0.1"] * 2), (("alice=a", "b"), ["alice", "key-2"])):
        with run_server(tokenizer_folder, api_keys=keys) as server:
            server.play("x")
            for key in ("a", "b"):
                headers = {"Authorization": f"Bearer {key}"}
                server.request("POST", "/v1/completions", BODY, headers)
            assert [item.user for item in server.engine.submitted] == users


def test_usage_is_counted_by_the_name_of_the_key(tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder, api_keys=("alice=s3cret", "alice=other", "plain")) as server:
        server.play("x")
        for key, fields in (
            ("s3cret", {}), ("other", {"stream": True}), ("plain", {"n": 2}),
            ("plain", {"max_tokens": -1}),  # refused: not submitted
            ("wrong", {}), ("alice", {}),
        ):  # fmt: skip
            headers = {"Authorization": f"Bearer {key}"}
            server.request("POST", "/v1/completions", {**BODY, **fields}, headers)
        num_prompt_tokens = len(server.engine.submitted[0].prompt)
        status, _, reply = server.request("GET", "/metrics", None, {"x-api-key": "plain"})
    assert status == 200
    text = reply.decode()
    found = {
        (sample.name, sample.labels["key_name"]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "key_name" in sample.labels
    }
    assert num_prompt_tokens > 0
    assert found == {
        ("pyserve:key_requests_total", "alice"): 2,
        ("pyserve:key_requests_total", "key-3"): 1,
        ("pyserve:key_prompt_tokens_total", "alice"): 2 * num_prompt_tokens,
        ("pyserve:key_prompt_tokens_total", "key-3"): num_prompt_tokens,
        ("pyserve:key_generation_tokens_total", "alice"): 2 * 2,
        ("pyserve:key_generation_tokens_total", "key-3"): 2 * 2,  # n
    }
    assert "s3cret" not in text and "plain" not in text


def test_without_keys_nothing_is_counted_by_name(tokenizer_folder: Path) -> None:
    with run_server(tokenizer_folder) as server:
        server.play("x")
        assert server.request("POST", "/v1/completions", BODY)[0] == 200
        assert b"key_name" not in server.request("GET", "/metrics")[2]
