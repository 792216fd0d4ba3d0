"""Embeddings and scores by the real server process, held to transformers from the text on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openai import BadRequestError
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoModelForCausalLM

from tests.api.endpoints.test_scores import prompt_of
from tests.api.fakes import PADDED_VOCAB, make_tokenizer_folder
from tests.e2e.conftest import start_server
from tests.engine.test_pooling import write_modules
from tests.model.oracle import make_model

TEXTS = ["Hello world, how are you?", "The quick brown fox", "😀 emoji", "a" * 300]
SHAPE = {"head_dim": 32, "vocab_size": PADDED_VOCAB, "max_position_embeddings": 512}


def write_tokenizer(folder: Path) -> Backend:
    """As Qwen3-Embedding's: it puts <|endoftext|> behind a text; and it has "yes" and "no"."""
    path = make_tokenizer_folder(folder) / "tokenizer.json"
    backend = Backend.from_file(str(path))
    backend.add_tokens(["no", "yes"])
    end = "<|endoftext|>"
    backend.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, backend.token_to_id(end))]
    )
    backend.save(str(path))
    return backend


def test_an_embedding_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    backend = write_tokenizer(folder)
    make_model("qwen3", **SHAPE).base_model.save_pretrained(folder)
    write_modules(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()

    def vector(text: str) -> Any:
        with torch.inference_mode():
            ids = torch.tensor([backend.encode(text).ids])
            hidden = model(ids).last_hidden_state[0, -1]
        return torch.nn.functional.normalize(hidden, dim=0).numpy()

    with start_server(tmp_path / "log", "--model", str(folder)) as server:
        with server.client() as client:
            answer = client.embeddings.create(model=str(folder), input=TEXTS)
            again = client.embeddings.create(model=str(folder), input=TEXTS * 20)
            short = client.embeddings.create(model=str(folder), input=TEXTS[0], dimensions=10)
            body = {"text_1": TEXTS[0], "text_2": TEXTS}
            scores = [item["score"] for item in server.json("/score", body)["data"]]
            with pytest.raises(BadRequestError, match="makes embeddings"):
                client.completions.create(model=str(folder), prompt="hi")
        expected = np.array([vector(text) for text in TEXTS])
        for data, count in ((answer.data, 1), (again.data, 20)):
            ours = np.array([item.embedding for item in data])
            np.testing.assert_allclose(ours, np.tile(expected, (count, 1)), atol=2e-5)
        assert scores == pytest.approx(list(expected @ expected[0]), abs=2e-5)
        cut = expected[0][:10] / np.linalg.norm(expected[0][:10])
        np.testing.assert_allclose(short.data[0].embedding, cut, atol=2e-5)
        assert answer.usage.prompt_tokens == sum(len(backend.encode(text).ids) for text in TEXTS)
        assert server.metric("vllm:generation_tokens_total") == 0
        server.wait_idle()


def test_a_reranker_by_a_flag(tmp_path: Path) -> None:
    """The checkpoint as it is published: one that generates, and says nothing else."""
    folder = tmp_path / "model"
    backend = write_tokenizer(folder)
    make_model("qwen3", **SHAPE, tie_word_embeddings=True).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def score(query: str, document: str) -> float:
        ids = backend.encode(prompt_of(query, document), add_special_tokens=False).ids
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0, -1]
        pair = logits[[backend.token_to_id("no"), backend.token_to_id("yes")]]
        return float(torch.softmax(pair, 0)[1])

    with start_server(tmp_path / "log", "--model", str(folder), "--task", "score") as server:
        body = {"query": "Which fox?", "documents": TEXTS[:3]}
        results = server.json("/v2/rerank", body)["results"]
        scored = server.json("/score", {"text_1": "Which fox?", "text_2": TEXTS[:3]})["data"]
        status, reply = server.request("POST", "/v1/embeddings", b'{"input": "a"}')
    expected = [score("Which fox?", text) for text in TEXTS[:3]]
    assert np.ptp(expected) > 0.01
    assert [item["score"] for item in scored] == pytest.approx(expected, abs=2e-5)
    assert [one["index"] for one in results] == sorted(range(3), key=lambda i: -expected[i])
    assert status == 400 and "scores documents" in json.loads(reply)["error"]["message"]
