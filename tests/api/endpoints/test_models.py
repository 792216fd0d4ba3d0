"""/v1/models and /v1/models/{id}."""

from __future__ import annotations

import json

from tests.api.fakes import CONTEXT, MODEL, Server


def test_one_entry_per_name(server: Server) -> None:
    status, _, reply = server.request("GET", "/v1/models")
    listed = json.loads(reply)
    assert status == 200 and listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [MODEL, "alias"]
    first = listed["data"][0]
    assert (first["object"], first["root"], first["parent"]) == ("model", MODEL, None)
    assert first["max_model_len"] == CONTEXT
    (permission,) = first["permission"]
    assert permission["id"].startswith("modelperm-") and permission["organization"] == "*"


def test_one_by_its_name(server: Server) -> None:
    status, _, reply = server.request("GET", f"/v1/models/{MODEL}")
    assert status == 200 and json.loads(reply)["id"] == MODEL
    status, _, reply = server.request("GET", "/v1/models/nobody")
    assert status == 404 and json.loads(reply)["error"]["param"] == "model"
