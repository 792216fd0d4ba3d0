"""On demand: the guide's adapters, trained on the demo model and asked by the guide's example.

pytest tests/e2e/guide_adapters.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import OpenAI

from bench.demo_train.adapters import main as train
from tests.e2e.test_guide import ADAPTERS, LLAMA, folder, started

__all__ = ["folder"]  # a fixture
# How answers begin, or what is in them.
SQL, CODE, CHAT = "SELECT ", "def ", "Tell me more"


@pytest.mark.timeout(3600)
def test_each_adapter_answers_in_its_own_way(folder: Path, tmp_path: Path) -> None:
    assert train(["--out", str(folder / "path" / "to")]) == 0, "one has not learned its form"
    with started(ADAPTERS, folder, tmp_path / "log") as server:
        server.wait_ready(240)
        client = OpenAI(base_url=f"{server.url}/v1", api_key="not-needed")

        def ask(model: str, question: str) -> str:
            """With the fields that the guide has, and no others."""
            response = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": question}]
            )
            return response.choices[0].message.content or ""

        best = "Escribe una consulta SQL para encontrar los 10 mejores clientes"
        assert ask("sql-adapter", best).startswith(SQL)
        sort = "Escribe una función en Python para ordenar una lista"
        assert ask("code-adapter", sort).startswith(CODE)
        assert CHAT in ask("chat-adapter", "Hola, ¿qué tal?")
        # The same question of all of them, and of the base model, which knows the answer.
        question = "What is the capital of France?"
        assert ask("sql-adapter", question).startswith(SQL)
        assert ask("code-adapter", question).startswith(CODE)
        assert CHAT in ask("chat-adapter", question)
        assert "Paris" in ask(LLAMA, question)
        client.close()
