"""/openapi.json: every route is in it, its bounds are the real ones, its replies what is sent."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest

from pyserve.api.app import ROUTES
from pyserve.api.pages.openapi import Document, schemas
from pyserve.api.pages.operations import OPERATIONS
from pyserve.api.wire.fields import BOUNDS, DESCRIPTIONS
from pyserve.client import PoolingInfo
from pyserve.features import fields_of
from tests.api.fakes import MODEL, Server, run_server

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
NOT_DESCRIBED = {"/", "/docs", "/openapi.json", "/static/{name}"}  # for people, not for programs
Schema = dict[str, Any]
BODIES = {operation.body.__name__: operation.body for operation in OPERATIONS.values()
          if operation.body is not None}  # fmt: skip


@pytest.fixture
def served(tokenizer_folder: Path) -> Iterator[Server]:
    with run_server(tokenizer_folder) as server:
        yield server


def document(has_key: bool = True, root_path: str = "") -> Schema:
    routes = {(route.method, route.path): route.is_public for route in ROUTES}
    return Document(routes, root_path=root_path, has_key=has_key).describe()


def references(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref":
                yield inner
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_it_is_served_as_built(server: Server) -> None:
    status, headers, body = server.request("GET", "/openapi.json")
    assert status == 200 and headers["Content-Type"].startswith("application/json")
    assert json.loads(body) == json.loads(msgspec.json.encode(document(has_key=False)))


def test_every_route_is_described() -> None:
    described = document()
    found = {(method.upper(), path) for path, item in described["paths"].items() for method in item}
    routes = {(route.method, re.sub(r":[^}]*", "", route.path)) for route in ROUTES}
    assert found == {(method, path) for method, path in routes if path not in NOT_DESCRIBED}
    assert found == set(OPERATIONS)
    ids = [operation["operationId"] for item in described["paths"].values()
           for operation in item.values()]  # fmt: skip
    assert len(set(ids)) == len(ids)


def test_keys_are_asked_for_where_they_are_needed() -> None:
    public = {(route.method, route.path) for route in ROUTES if route.is_public}
    keys: list[Schema] = [{"bearer": []}, {"x-api-key": []}]
    for has_key in (True, False):
        for path, item in document(has_key)["paths"].items():
            for method, operation in item.items():
                is_guarded = has_key and (method.upper(), path) not in public
                assert operation["security"] == (keys if is_guarded else [])
                assert ("401" in operation["responses"]) == is_guarded
    assert "servers" not in document()
    assert document(root_path="/llm")["servers"] == [{"url": "/llm"}]


def test_query_parameters_are_described() -> None:
    listed = document()["paths"]["/v1/files"]["get"]
    assert {"400", "200"} <= set(listed["responses"])
    found = {parameter["name"]: parameter["schema"] for parameter in listed["parameters"]}
    assert found == {
        "after": {"type": "string"},
        "limit": {"type": "integer", "minimum": 1, "maximum": 10_000, "default": 100},
        "order": {"enum": ["asc", "desc"], "default": "desc"},
        "purpose": {"type": "string"},
    }


def test_an_unknown_field_is_named(served: Server) -> None:
    """By each endpoint with a body, as the document promises."""
    elsewhere = {"/v1/batches", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"}  # need flags
    paths = {
        path: operation for (method, path), operation in OPERATIONS.items()
        if operation.body is not None and not operation.is_queued and path not in elsewhere
    }  # fmt: skip
    assert {CHAT, "/v1/responses/input_tokens", "/tokenize"} <= set(paths)
    for path, operation in paths.items():
        served.play("Hello")
        body = {**(operation.example or {}), "mood": 1}
        status, headers, reply = served.request("POST", path, body)
        assert (status, headers.get("x-pyserve-ignored")) == (200, "mood"), (path, reply)


def test_references_lead_somewhere() -> None:
    described = document()
    for reference in references(described):
        name = reference.removeprefix("#/components/schemas/")
        assert name in described["components"]["schemas"]


def test_what_is_not_built_does_not_appear() -> None:
    found = schemas()
    for name, wire_type in BODIES.items():
        rows = fields_of(wire_type)
        ignored = {field for field, row in rows.items() if row.is_ignored}
        assert set(found[name]["properties"]) == set(wire_type.__struct_fields__) - (
            set(rows) - ignored
        )
        for field in ignored:
            assert "without effect" in found[name]["properties"][field]["description"]
    fields = {field for schema in found.values() for field in schema.get("properties", ())}
    assert set(BOUNDS) <= fields and set(DESCRIPTIONS) <= fields


def variants(schema: Schema) -> Iterator[Schema]:
    yield from schema.get("anyOf", [schema])


def edges(schema: Schema, number: type) -> Iterator[tuple[object, bool]]:
    """Values at and just beyond the bounds, and whether they are within."""
    step = number(1) if number is int else 1e-6
    for key, sign in (("minimum", -1), ("maximum", 1)):
        if key in schema:
            yield number(schema[key]), True
            beyond = schema[key] * (1 + sign * 1e-6) if 0 < schema[key] < 1e-6 else (
                schema[key] + sign * step
            )  # fmt: skip
            yield beyond, False
    if "exclusiveMinimum" in schema:
        yield number(schema["exclusiveMinimum"]), False
        yield schema["exclusiveMinimum"] + 1e-12, True
    for key, size in (("minLength", 0), ("maxLength", 1)):
        if key in schema:
            yield "a" * schema[key], True
            yield "a" * (schema[key] - 1 + 2 * size), False


def in_sampling() -> list[tuple[str, object, bool]]:
    properties = schemas()["ChatRequest"]["properties"]
    found: list[tuple[str, object, bool]] = []
    elsewhere = {"messages", "stop", "stop_token_ids", "chat_template"}  # the last is not trusted
    for name in sorted(set(BOUNDS) & set(properties) - elsewhere):
        for variant in variants(properties[name]):
            number = int if variant.get("type") == "integer" else float
            found += [(name, value, ok) for value, ok in edges(variant, number)]
    return found


@pytest.mark.parametrize(("name", "value", "is_within"), in_sampling(), ids=lambda v: str(v)[:24])
def test_bounds_are_the_real_ones(server: Server, name: str, value: Any, is_within: bool) -> None:
    server.play("Hi", eos=False)
    body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 1, name: value}
    if name == "max_completion_tokens":
        del body["max_tokens"]
    if name == "top_logprobs":
        body["logprobs"] = True
    status, _, reply = server.request("POST", CHAT, body)
    if is_within:
        assert status == 200, reply
        return
    error = json.loads(reply)["error"]
    assert status == 400
    assert name in error["message"] and error["param"] in (name, None)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("stop", ["a", "a" * 1001, ""]),
        ("stop", [["a"] * 64, ["a"] * 65, ["a", ""], ["a" * 1001]]),
        ("stop_token_ids", [[0] * 60, [0] * 65, [-1]]),
        ("allowed_token_ids", [list(range(400)), [], [1, -1]]),
        ("bad_words", [["a" * 256, "b", " c"], ["a"] * 129, ["a", ""], ["a" * 257]]),
        ("logit_bias", [{str(i): 100 for i in range(300)}, {str(i): 0 for i in range(301)},
                        {"x": 1}, {"-1": 1}, {"1": 100.1}, {"1": -100.1}]),
        ("messages", [MESSAGES * 8, [], [{"role": "nobody", "content": "hi"}],
                      [{"role": "user", "content": [{"type": "nothing"}]}]]),
    ],
    ids=["string", "strings", "ids", "allowed", "words", "bias", "messages"],
)  # fmt: skip
def test_bounds_of_lists(server: Server, name: str, values: list[Any]) -> None:
    """The first of `values` is within what the schema says, the others are not."""
    schema = schemas()
    server.play("Hi", eos=False)
    for place, value in enumerate(values):
        assert fits(value, schema["ChatRequest"]["properties"][name], schema) == (place == 0)
        body = {"messages": MESSAGES, "max_tokens": 1, name: value}
        status, _, reply = server.request("POST", CHAT, body)
        assert status == (200 if place == 0 else 400), reply
        if status == 400:
            assert name in reply.decode()


KINDS: dict[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "array": list,
    "object": dict, "null": type(None), "boolean": bool,
}  # fmt: skip


def fits(value: Any, schema: Schema, found: dict[str, Schema]) -> bool:
    """A validator of the keywords that the document uses; the test's own words for them."""
    if "$ref" in schema:
        return fits(value, found[schema["$ref"].rpartition("/")[2]], found)
    kinds = schema.get("type", list(KINDS))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if isinstance(value, bool) and "boolean" not in kinds:
        return False
    if not any(isinstance(value, KINDS[kind]) for kind in kinds):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if "anyOf" in schema and not any(fits(value, one, found) for one in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(fits(value, one, found) for one in schema["oneOf"]) != 1:
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if isinstance(value, str):
        return bool(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 2**60))
    if isinstance(value, list):
        return schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 2**60) and all(
            fits(item, schema.get("items", {}), found) for item in value
        )
    return not isinstance(value, dict) or object_fits(value, schema, found)


def object_fits(value: dict[str, Any], schema: Schema, found: dict[str, Schema]) -> bool:
    properties = schema.get("properties", {})
    pattern = schema.get("propertyNames", {}).get("pattern", "")
    return (
        len(value) <= schema.get("maxProperties", 2**60)
        and set(schema.get("required", ())) <= set(value)
        and all(re.search(pattern, key) for key in value)
        and all(
            fits(item, properties.get(key, schema.get("additionalProperties", {})), found)
            for key, item in value.items()
        )
    )


def check_reply(value: Any, name: str, found: dict[str, Schema]) -> None:
    """`value` fits its schema, and has no key that the schema does not know."""
    assert fits(value, found[name], found), (name, value)
    for key, inner in value.items():
        schema = found[name]["properties"][key]
        for variant in [schema, *schema.get("anyOf", ())]:
            reference = variant.get("$ref") or variant.get("items", {}).get("$ref", "")
            inner_name = reference.rpartition("/")[2]
            if inner_name and inner is not None:
                for item in inner if isinstance(inner, list) else [inner]:
                    check_reply(item, inner_name, found)


def test_replies_are_as_described(served: Server) -> None:
    found = schemas()
    options = {"stream_options": {"include_usage": True}}
    for path, body, whole, chunk in (
        (CHAT, {"messages": MESSAGES}, "ChatResponse", "ChatChunk"),
        (COMPLETIONS, {"prompt": "Hello"}, "CompletionResponse", "CompletionChunk"),
    ):
        served.play("Hello world")
        check_reply(served.post(path, body), whole, found)
        for frame in served.frames(path, {**body, **options}):
            check_reply(frame, chunk, found)
        check_reply({"error": served.error(path, {"n": 0, **body})}, "ErrorResponse", found)
    check_reply(served.post("/tokenize", {"prompt": "Hello"}), "TokenizeResponse", found)
    check_reply(served.post("/detokenize", {"tokens": [80]}), "DetokenizeResponse", found)
    for path, name in (
        ("/v1/models", "ModelList"), (f"/v1/models/{MODEL}", "Model"), ("/load", "Load"),
        ("/version", "Version"), ("/health", "Ready"), ("/health/ready", "Ready"),
        ("/ping", "Ready"), ("/health/live", "Live"),
    ):  # fmt: skip
        check_reply(json.loads(served.request("GET", path)[2]), name, found)
    for status in ("starting", "draining"):
        served.state.status = status
        got, _, reply = served.request("GET", "/health")
        assert got == 503
        check_reply(json.loads(reply), "NotReady", found)
    served.state.status = "ready"


class Bodies:
    """Random bodies from a seed: by the schema, or with one thing in them that is not."""

    STRINGS = ("", "a", "Hello world", "\u0000", "😀\u202e", "<|im_end|>", "x" * 2000, "-1", "ſ")
    NUMBERS = (0, 1, -1, 2, 0.5, -0.0, 1e-9, 1e308, 2**31, 2**53, -(2**63), 2**64, 10**30, 1e-320)

    def __init__(self, seed: int, found: dict[str, Schema]) -> None:
        self.random = random.Random(seed)
        self.found = found

    def by_schema(self, schema: Schema, depth: int = 0) -> Any:
        rng = self.random
        if "$ref" in schema:
            return self.by_schema(self.found[schema["$ref"].rpartition("/")[2]], depth)
        if "anyOf" in schema and "type" not in schema:
            return self.by_schema(rng.choice(schema["anyOf"]), depth)
        if "enum" in schema:
            return rng.choice(schema["enum"])
        kind = schema.get("type", "null")
        if kind == "object":
            while not fits(value := self.an_object(schema, depth), schema, self.found):
                pass  # one field has ruled out another
            return value
        if kind == "array":
            count = rng.randint(schema.get("minItems", 0), 3)
            return [self.by_schema(schema.get("items", {}), depth + 1) for _ in range(count)]
        if kind in ("integer", "number"):
            low, high = schema.get("minimum", -5), schema.get("maximum", 500)
            edge = rng.choice((low, high, min(max(rng.randint(-2, 20), low), high)))
            return int(edge) if kind == "integer" else edge
        if kind == "string":
            fitting = [text for text in self.STRINGS if fits(text, schema, self.found)]
            return rng.choice(fitting)
        return {"boolean": rng.random() < 0.5, "null": None}[kind]

    def an_object(self, schema: Schema, depth: int) -> dict[str, Any]:
        known, required = schema.get("properties", {}), schema.get("required", ())
        chosen = [key for key in known if key in required or self.random.random() < 0.25]
        value = {key: self.by_schema(known[key], depth + 1) for key in chosen}
        if isinstance(extra := schema.get("additionalProperties"), dict):
            for _ in range(self.random.randint(0, 3)):
                value[str(self.random.randint(0, 447))] = self.by_schema(extra, depth + 1)
        return value

    def anything(self, depth: int = 0) -> Any:
        rng = self.random
        kind = rng.randrange(6 if depth < 3 else 4)
        if kind == 0:
            return rng.choice(self.STRINGS)
        if kind == 1:
            return rng.choice(self.NUMBERS)
        if kind in (2, 3):
            return rng.choice((None, True, False))
        if kind == 4:
            return [self.anything(depth + 1) for _ in range(rng.randint(0, 3))]
        return {
            rng.choice(self.STRINGS): self.anything(depth + 1) for _ in range(rng.randint(0, 3))
        }

    def spoiled(self, wire_type: type[msgspec.Struct]) -> Any:
        value = self.by_schema({"$ref": wire_type.__name__})
        fields = list(wire_type.__struct_fields__)  # what is not built as well
        for _ in range(self.random.randint(1, 3)):
            value[self.random.choice([*fields, "unknown"])] = self.anything()
        return value


@pytest.mark.parametrize("seed", range(4))
def test_random_bodies_get_an_answer_that_is_described(served: Server, seed: int) -> None:
    described = document(has_key=False)
    bodies = Bodies(seed, described["components"]["schemas"])
    served.play("Hello", burst=8)
    posts = {
        path: item["post"] for path, item in described["paths"].items()
        if "application/json" in item.get("post", {}).get("requestBody", {}).get("content", {})
    }  # fmt: skip
    pooling = {path for path in posts if OPERATIONS["POST", path].is_queued}
    seen = ask_at_random(served, bodies, {path: posts[path] for path in posts.keys() - pooling})
    assert {200, 400} <= seen
    assert served.request("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("kind", "paths"), [("embed", ["/v1/embeddings"]), ("score", ["/v1/rerank", "/v1/score"])]
)
def test_random_bodies_about_what_is_pooled(
    tokenizer_folder: Path, kind: Literal["embed", "score"], paths: list[str]
) -> None:
    described = document(has_key=False)
    bodies = Bodies(0, described["components"]["schemas"])
    with run_server(tokenizer_folder, pooling=PoolingInfo(kind, 6)) as server:
        server.engine.pool = lambda ids: np.ones(6, np.float32)
        posts = {path: described["paths"][path]["post"] for path in paths}
        assert {200, 400} <= ask_at_random(server, bodies, posts)


def ask_at_random(served: Server, bodies: Bodies, posts: dict[str, Schema]) -> set[int]:
    """The statuses of 100 answers of each path, all of which are as described."""
    seen: set[int] = set()
    for _ in range(100):
        for path, operation in sorted(posts.items()):
            content = operation["requestBody"]["content"]["application/json"]
            row = OPERATIONS["POST", path]
            body = bodies.by_schema(content["schema"])
            if bodies.random.random() < 0.5:
                assert row.body is not None
                body = bodies.spoiled(row.body)
            if isinstance(body.get("n"), int) and body["n"] > 4:
                body["n"] = 4  # the fake engine's time
            status, headers, reply = served.request("POST", path, body)
            seen.add(status)
            assert str(status) in operation["responses"] and status < 500, (path, body, reply)
            if status != 200:
                check_reply(json.loads(reply), row.error.__name__, bodies.found)
            elif headers["Content-Type"] == "application/json":
                reference = operation["responses"]["200"]["content"]["application/json"]["schema"]
                check_reply(
                    json.loads(reply), reference["$ref"].rpartition("/")[2], bodies.found
                )  # fmt: skip
    return seen
