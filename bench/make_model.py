"""Make a model folder of any shape without a hub: config, synthetic tokenizer, random weights.

    python -m bench.make_model llama-3.1-8b /tmp/llama
    python -m pyserve --model /tmp/llama --load-format dummy

The tokenizer is a real byte-level BPE of exactly the asked size whose merges are generated, not
trained: it encodes any text and decodes any id. `--weights` writes bfloat16 safetensors in shards,
one tensor at a time, so that two servers can be compared on the same checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from bench.model_presets import PRESETS

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL_TOKENS = ("<|begin|>", "<|end|>", "<|turn|>", "<|endturn|>")
BOS, EOS, TURN, END_OF_TURN = SPECIAL_TOKENS
POOL_VALUES = 2**25  # random weights are slices of this many; 64 MiB, more than any L2
SHARD_BYTES = 4 * 2**30

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{TURN}{{{{ message['role'] }}}}\n{{{{ message['content'] }}}}{END_OF_TURN}\n"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{TURN}assistant\n{{% endif %}}"
)


def make_config(preset: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The preset's config.json with `overrides` and the ids of its special tokens."""
    first_special = overrides.get("vocab_size", PRESETS[preset]["vocab_size"]) - len(SPECIAL_TOKENS)
    ids = {
        "bos_token_id": first_special + SPECIAL_TOKENS.index(BOS),
        "eos_token_id": first_special + SPECIAL_TOKENS.index(EOS),
    }
    return {**PRESETS[preset], **ids, **overrides}


def make_tokenizer(vocab_size: int, *, has_bos: bool) -> Tokenizer:
    """Byte-level BPE with `vocab_size` tokens: bytes, generated merges, the special tokens last.

    Merges build every pair of letters, then each pair after a space, then strings of four. ASCII
    only, so that random ids decode to whole characters except among the 128 upper byte tokens.
    ValueError where the size is too small for bytes and specials or beyond what merges can give.
    """
    num_merges = vocab_size - 256 - len(SPECIAL_TOKENS)
    if num_merges < 0:
        raise ValueError(f"vocab_size must be at least {256 + len(SPECIAL_TOKENS)}")
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = list(itertools.islice(_merges(), num_merges))
    if len(merges) < num_merges:
        raise ValueError(f"vocab_size {vocab_size} is beyond the {len(merges)} merges there are")
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL_TOKENS])
    if has_bos:
        bos_id = tokenizer.token_to_id(BOS)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
        )
    assert tokenizer.get_vocab_size() == vocab_size
    return tokenizer


def _merges() -> Iterator[tuple[str, str]]:
    pairs = [left + right for left in LETTERS for right in LETTERS]
    yield from itertools.product(LETTERS, LETTERS)
    yield from (("\u0120", pair) for pair in pairs)  # G with a dot: byte-level BPE's space
    for left, right in itertools.product(pairs, pairs):
        yield left, right
        yield "\u0120" + left, right


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of the checkpoint, layer by layer."""
    hidden = config["hidden_size"]
    attention = _latent_shapes if "kv_lora_rank" in config else _attention_shapes
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield from attention(config, f"{prefix}self_attn.")
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        if config["model_type"] == "gemma2":
            yield prefix + "pre_feedforward_layernorm.weight", (hidden,)
            yield prefix + "post_feedforward_layernorm.weight", (hidden,)
        if layer < config.get("first_k_dense_replace", 0) or not _num_experts(config):
            yield from _mlp_shapes(config, prefix)
        else:
            yield from _experts_shapes(config, prefix)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _attention_shapes(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // num_heads
    q_size, kv_size = num_heads * head_dim, config["num_key_value_heads"] * head_dim
    is_qwen2, is_phi3 = config["model_type"] == "qwen2", config["model_type"] == "phi3"
    has_bias = is_qwen2 or config.get("attention_bias", False)
    separate = (("q", q_size), ("k", kv_size), ("v", kv_size))
    for name, size in (("qkv", q_size + 2 * kv_size),) if is_phi3 else separate:
        yield f"{prefix}{name}_proj.weight", (size, hidden)
        if has_bias:
            yield f"{prefix}{name}_proj.bias", (size,)
    if config["model_type"] in ("qwen3", "qwen3_moe"):
        yield prefix + "q_norm.weight", (head_dim,)
        yield prefix + "k_norm.weight", (head_dim,)
    yield prefix + "o_proj.weight", (hidden, q_size)
    if has_bias and not is_qwen2:
        yield prefix + "o_proj.bias", (hidden,)


def _latent_shapes(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of multi-head latent attention, without biases."""
    hidden, num_heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, v_dim = (config[f"{part}_head_dim"] for part in ("qk_nope", "qk_rope", "v"))
    latent = config["kv_lora_rank"]
    q_size, q_rank = num_heads * (nope + rope), config["q_lora_rank"]
    if q_rank:
        yield prefix + "q_a_proj.weight", (q_rank, hidden)
        yield prefix + "q_a_layernorm.weight", (q_rank,)
        yield prefix + "q_b_proj.weight", (q_size, q_rank)
    else:
        yield prefix + "q_proj.weight", (q_size, hidden)
    yield prefix + "kv_a_proj_with_mqa.weight", (latent + rope, hidden)
    yield prefix + "kv_a_layernorm.weight", (latent,)
    yield prefix + "kv_b_proj.weight", (num_heads * (nope + v_dim), latent)
    yield prefix + "o_proj.weight", (hidden, num_heads * v_dim)


def _mlp_shapes(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of one layer: a gated MLP."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    first: tuple[tuple[str, int], ...] = (("gate", inner), ("up", inner))
    if config["model_type"] == "phi3":
        first = (("gate_up", 2 * inner),)
    for name, shape in (*((n, (size, hidden)) for n, size in first), ("down", (hidden, inner))):
        yield f"{prefix}mlp.{name}_proj.weight", shape
        if config.get("mlp_bias", False):
            yield f"{prefix}mlp.{name}_proj.bias", shape[:1]


def _num_experts(config: dict[str, Any]) -> int:
    keys = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((config[key] for key in keys if key in config), 0)


def _experts_shapes(config: dict[str, Any], prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of one layer: a router, its experts, and those that take every token."""
    module, names = "mlp", ("gate_proj", "up_proj", "down_proj")
    if config["model_type"] == "mixtral":
        module, names = "block_sparse_moe", ("w1", "w3", "w2")
    hidden, num_experts = config["hidden_size"], _num_experts(config)
    size = config.get("moe_intermediate_size", config["intermediate_size"])

    def matrices(expert: str, size: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for name, shape in zip(
            names, ((size, hidden), (size, hidden), (hidden, size)), strict=True
        ):
            yield f"{prefix}{module}.{expert}.{name}.weight", shape

    yield f"{prefix}{module}.gate.weight", (num_experts, hidden)
    if config.get("topk_method") == "noaux_tc":
        yield f"{prefix}{module}.gate.e_score_correction_bias", (num_experts,)
    for expert in range(num_experts):
        yield from matrices(f"experts.{expert}", size)
    if config.get("n_shared_experts"):
        yield from matrices("shared_experts", config["n_shared_experts"] * size)


def mean_of_norms(config: dict[str, Any]) -> float:
    """Of the weights of a norm that changes little: Gemma's multiply by 1 + weight."""
    return 0.0 if config["model_type"] == "gemma2" else 1.0


def write_weights(folder: Path, config: dict[str, Any], *, seed: int, shard_bytes: int) -> int:
    """Random bfloat16 shards and their index; returns the bytes of all tensors.

    Matrices are slices, at an offset of their own, of one pool of N(0, initializer_range) values;
    norms change nothing, biases are 0.
    """
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(POOL_VALUES, dtype=np.float32) * config["initializer_range"]
    pool16 = (pool.view(np.uint32) >> 16).astype("<u2")  # bfloat16 is the upper half
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensor_shapes(config):
        num_bytes = 2 * int(np.prod(shape, dtype=np.int64))
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += num_bytes
    weight_map = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        if len(shards) == 1:
            file_name = "model.safetensors"
        total += _write_shard(folder / file_name, shard, pool16, seed, mean_of_norms(config))
        weight_map.update({name: file_name for name, _ in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    return total


def _write_shard(
    path: Path, shard: list[tuple[str, tuple[int, ...]]], pool: np.ndarray, seed: int, norm: float
) -> int:
    """safetensors: u64 header length, JSON header padded to 8 bytes, tensors back to back."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard:
        end = offset + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shard:
            num_values = int(np.prod(shape, dtype=np.int64))
            if name.endswith("norm.weight"):
                bits = 0x3F80 if norm else 0  # 1.0 or 0.0
                file.write(np.full(num_values, bits, "<u2").tobytes())
            else:
                _write_tensor(file, name, num_values, pool, seed)
    return offset


def _write_tensor(file: BinaryIO, name: str, num_values: int, pool: np.ndarray, seed: int) -> None:
    if name.endswith(".bias"):
        file.write(bytes(2 * num_values))
        return
    start = zlib.crc32(f"{seed} {name}".encode()) % len(pool)
    while num_values > 0:
        piece = pool[start : start + num_values]
        file.write(piece.data)
        num_values -= len(piece)
        start = 0


def make_model(
    folder: Path,
    preset: str,
    overrides: dict[str, Any],
    *,
    has_weights: bool,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the whole folder; returns its config."""
    config = make_config(preset, overrides)
    folder.mkdir(parents=True, exist_ok=True)
    has_bos = config["model_type"] in ("llama", "mistral", "mixtral")
    make_tokenizer(config["vocab_size"], has_bos=has_bos).save(str(folder / "tokenizer.json"))
    _write_json(folder / "config.json", config)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS if has_bos else None,
        "eos_token": EOS,
        "add_bos_token": has_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(folder / "tokenizer_config.json", tokenizer_config)
    end_of_turn = config["vocab_size"] - len(SPECIAL_TOKENS) + SPECIAL_TOKENS.index(END_OF_TURN)
    generation = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": [config["eos_token_id"], end_of_turn],
    }
    _write_json(folder / "generation_config.json", generation)
    if has_weights:
        write_weights(folder, config, seed=seed, shard_bytes=shard_bytes)
    return config


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def parse_override(text: str) -> tuple[str, Any]:
    """KEY=VALUE; the value is JSON, or a string where it is not."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise argparse.ArgumentTypeError(f"want FIELD=VALUE, got {text}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--set", type=parse_override, action="append", default=[], metavar="FIELD=VALUE",
        help="override any field of config.json; may be repeated",
    )  # fmt: skip
    parser.add_argument("--weights", action="store_true", help="write random bfloat16 safetensors")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    started_s = time.perf_counter()
    overrides = dict(args.set)
    try:
        config = make_model(
            args.folder, args.preset, overrides, has_weights=args.weights, seed=args.seed
        )
    except ValueError as error:
        parser.error(str(error))
    num_parameters = sum(int(np.prod(shape, dtype=np.int64)) for _, shape in tensor_shapes(config))
    print(
        f"{args.folder}: {config['architectures'][0]}, {num_parameters / 1e9:.3f} G parameters, "
        f"vocabulary {config['vocab_size']:,}, {time.perf_counter() - started_s:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
