from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer

from bench import smollm2
from pyserve.text.tokenizer import Tokenizer

HIDDEN, HEADS, KV_HEADS, INNER = 64, 4, 2, 96
TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *"ab12",
    "Ġ",
    "ab",
    "Ġab",
    *map(str, range(3, 9)),
]


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    kind, items = (8, map(gguf_string, value)) if isinstance(value[0], str) else (
        5, (struct.pack("<i", item) for item in value))  # fmt: skip
    return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)


def packed(kind: int, rng: np.random.Generator, shape: tuple[int, int]) -> tuple[bytes, np.ndarray]:
    """Random blocks, and what they stand for by the definition of the format, value by value."""
    data, values = b"", []
    for _ in range(shape[0] * shape[1] // 32):
        scale, least = (float(np.float16(x)) for x in rng.normal(size=2))
        if kind == smollm2.Q8_0:
            numbers = rng.integers(-128, 128, 32).tolist()
            data += struct.pack("<e32b", scale, *numbers)
            values += [scale * number for number in numbers]
        else:
            numbers = rng.integers(0, 16, 32).tolist()
            halves = [numbers[i] | numbers[i + 16] << 4 for i in range(16)]
            data += struct.pack("<ee16B", scale, least, *halves)
            values += [scale * number + least for number in numbers]
    return data, np.array(values, np.float32).reshape(shape)


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k."""
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A GGUF file of one layer, and the values of its tensors."""
    metadata = {
        "general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 128,
        "llama.embedding_length": HIDDEN, "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.vocab_size": len(TOKENS), "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": ["a b", "Ġ ab"], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2, "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    rng = np.random.default_rng(3)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "blk.0.attn_q": (HIDDEN, HIDDEN),
              "blk.0.attn_k": (kv, HIDDEN), "blk.0.attn_v": (kv, HIDDEN),
              "blk.0.attn_output": (HIDDEN, HIDDEN), "blk.0.ffn_gate": (INNER, HIDDEN),
              "blk.0.ffn_up": (INNER, HIDDEN), "blk.0.ffn_down": (HIDDEN, INNER)}  # fmt: skip
    values, infos, body = {}, b"", b""
    for name, shape in shapes.items():
        kind = smollm2.Q8_0 if name == "token_embd" else smollm2.Q4_1
        data, values[name] = packed(kind, rng, shape)
        infos += gguf_string(f"{name}.weight")
        infos += struct.pack("<IQQIQ", 2, shape[1], shape[0], kind, len(body))
        body += data + bytes(-len(data) % 32)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        values[name] = rng.normal(size=HIDDEN).astype(np.float32)
        infos += gguf_string(f"{name}.weight")
        infos += struct.pack("<IQIQ", 1, HIDDEN, smollm2.F32, len(body))
        body += values[name].tobytes()
    head = b"GGUF" + struct.pack("<IQQ", 3, len(values), len(metadata))
    head += b"".join(gguf_string(name) + gguf_value(value) for name, value in metadata.items())
    head += infos
    path = tmp_path / "model.gguf"
    path.write_bytes(head + bytes(-len(head) % 32) + body)
    return path, values


def test_a_folder_holds_what_the_file_says(
    tmp_path: Path, written: tuple[Path, dict[str, np.ndarray]]
) -> None:
    path, values = written
    folder = tmp_path / "model"
    smollm2.write_folder(path, folder)
    weights = load_file(folder / "model.safetensors")
    assert len(weights) == len(values) == 11
    layer = "model.layers.0."
    for name, part in [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"),
                       ("blk.0.attn_v", f"{layer}self_attn.v_proj"),
                       ("blk.0.ffn_down", f"{layer}mlp.down_proj"),
                       ("blk.0.ffn_norm", f"{layer}post_attention_layernorm")]:  # fmt: skip
        np.testing.assert_allclose(weights[f"{part}.weight"], values[name], rtol=1e-6, atol=1e-6)
    for name, heads in [("q", HEADS), ("k", KV_HEADS)]:
        weight = weights[f"{layer}self_attn.{name}_proj.weight"]
        expected = values[f"blk.0.attn_{name}"]
        np.testing.assert_allclose(permuted(weight, heads), expected, rtol=1e-6, atol=1e-6)
        assert not np.allclose(weight, expected)
    config = AutoConfig.from_pretrained(folder)
    assert (config.hidden_size, config.num_key_value_heads, config.rms_norm_eps) == (64, 2, 1e-5)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_its_tokenizer_is_read_as_transformers_reads_it(
    tmp_path: Path, written: tuple[Path, dict[str, np.ndarray]]
) -> None:
    folder = tmp_path / "model"
    smollm2.write_folder(written[0], folder)
    tokenizer = Tokenizer.from_folder(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in ("ab ab12", "<|im_start|>ab<|im_end|>", "21 ab"):
        assert tokenizer.encode(text, add_special_tokens=True) == theirs.encode(text)
    assert (tokenizer.eos_token_id, sorted(tokenizer.special_token_ids)) == (2, [0, 1, 2])


def test_what_is_no_gguf_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for junk in (b"GGUF\x02\0\0\0" + bytes(40), b"junk" * 20):
        path.write_bytes(junk)
        with pytest.raises(SystemExit, match="not a GGUF file of version 3"):
            smollm2.read_gguf(path)
