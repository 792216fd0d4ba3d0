"""Bodies made to hold up the event loop: each is refused, and /health answers all the while.

Worst answers before the bodies were counted: 5 s (messages), 13 s (keys), 2.6 s (parts). The limit
here is far above what is measured now (about 50 ms), as the machine that runs this may be busy.
"""

from __future__ import annotations

import pytest

from tests.api.fakes import Server, asking_health, least

NUM_BYTES = 31_000_000
MAX_LATENCY_S = 1.5

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MESSAGE = b'{"messages":[{"role":"user","content":%b}]}'
HI = b'{"messages":[{"role":"user","content":"hi"}],'


def fill(unit: bytes, separator: bytes = b",") -> bytes:
    return separator.join([unit] * (NUM_BYTES // len(unit + separator)))


def keys() -> bytes:
    return b",".join([b'"k%07d":1' % i for i in range(NUM_BYTES // 13)])


BODIES = {
    "messages": lambda: (CHAT, b'{"messages":[' + fill(b'{"role":"user","content":""}') + b"]}"),
    "keys": lambda: (CHAT, HI + keys() + b"}"),
    "keys of metadata": lambda: (CHAT, HI + b'"metadata":{' + keys() + b"}}"),
    "parts": lambda: (CHAT, MESSAGE % (b"[" + fill(b'{"type":"text","text":""}') + b"]")),
    "almost tokens": lambda: (CHAT, MESSAGE % (b'"' + fill(b"<|im_", b"") + b'"')),
    "tokens": lambda: (CHAT, MESSAGE % (b'"' + fill(b"<|im_end|>", b"") + b'"')),
    "ids": lambda: (COMPLETIONS, b'{"prompt":[' + fill(b"1") + b"]}"),
    "short prompts": lambda: (COMPLETIONS, b'{"prompt":[' + fill(b"[1,1]") + b"]}"),
    "text": lambda: (COMPLETIONS, b'{"prompt":"' + fill(b"word, ", b"") + b'"}'),
    "ids to text": lambda: ("/detokenize", b'{"tokens":[' + fill(b"1") + b"]}"),
}


@pytest.mark.parametrize("name", BODIES)
def test_health_answers_all_the_while(server: Server, name: str) -> None:
    path, body = BODIES[name]()

    def slowest_s() -> float:
        with asking_health(server) as latencies_s:
            server.error(path, body)
        return max(latencies_s, default=0.0)

    assert least(slowest_s, MAX_LATENCY_S) < MAX_LATENCY_S
    assert server.engine.submitted == []
