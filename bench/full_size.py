"""Full-size models against transformers: logits by the ratio rule, and what loading costs.

    python -m bench.full_size --folder /tmp/models --keep llama-3.1-8b
    python -m bench.full_size --folder /tmp/m --device cpu --set num_hidden_layers=2 ...

For each model: a random checkpoint is written (once), pyserve runs a prompt and teacher-forced
steps of it (full_size_ours.py, a fresh process, the engine's own steps), and transformers computes
the same tokens on the same weights: in bfloat16 (sdpa; the prompt at once, then step by step with
its cache) and, all at once, in float64, but for its norms and rotary angles, which it takes in
float32 whatever the dtype. Compared are the logits of all positions of the prompt, and of all
steps. Rule: error against float64 <= 2 x that of transformers in bfloat16 + 1e-6, both for
||x - exact|| / ||exact|| and for the largest difference over the largest logit.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import shutil
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging

from bench.make_model import (
    make_config,
    make_model,
    mean_of_norms,
    parse_override,
    tensor_shapes,
)
from bench.report import environment, write_json

SHARD_BYTES = 2 * 2**30
NUM_WRITERS = 6
OURS_TIMEOUT_S = 120
MIB = 2**20
MIN_LOAD_GB_PER_S = 3.0
MAX_ANONYMOUS_BYTES = 10**9
WINDOW = {"sliding_window": 4096, "rope_theta": 10000.0}  # of Mistral-7B-v0.1


@dataclass(frozen=True)
class Model:
    """A preset of make_model with changes; prompt_len 0: it is loaded only."""

    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    prompt_len: int = 512
    num_steps: int = 64


MODELS = {
    "llama-3.1-8b": Model("llama-3.1-8b"),
    "mistral-7b-v0.1": Model("mistral-7b", WINDOW),
    "qwen2.5-7b": Model("qwen2.5-7b"),
    # A prompt beyond the window, in chunks.
    "mistral-4-layers": Model("mistral-7b", {**WINDOW, "num_hidden_layers": 4}, 5000, 16),
    # Two layers of what has other layers than Llama; the first with a prompt beyond its window.
    "gemma-2-9b-2-layers": Model(
        "gemma-2-9b", {"num_hidden_layers": 2, "vocab_size": 2**15}, 5000, 16
    ),
    "phi-4-2-layers": Model("phi-4", {"num_hidden_layers": 2}, 512, 16),
    "phi-3-mini-2-layers": Model("phi-3-mini", {"num_hidden_layers": 2}, 3000, 16),
    "mixtral-8x7b-2-layers": Model("mixtral-8x7b", {"num_hidden_layers": 2}, 512, 16),
    # One layer without experts and one with; a quarter of the experts, as float64 of all is 90 GB.
    "deepseek-v3-2-layers": Model(
        "deepseek-v3",
        {
            "num_hidden_layers": 2, "first_k_dense_replace": 1, "n_routed_experts": 64,
            "vocab_size": 2**15,
        },
        512, 16,
    ),
    # One tensor of 3.2 GB.
    "large-tensor": Model(
        "llama-3.1-8b",
        {
            "vocab_size": 2**19, "hidden_size": 3072, "num_attention_heads": 24,
            "intermediate_size": 8192, "num_hidden_layers": 1, "tie_word_embeddings": True,
        },
        prompt_len=0,
    ),
}  # fmt: skip
DEFAULT_MODELS = [name for name in MODELS if not name.endswith("-2-layers")]


def write_checkpoint(folder: Path, model: Model, device: torch.device) -> None:
    """Config, tokenizer and random bfloat16 shards, made on the device."""
    make_model(folder, model.preset, model.changes, has_weights=False)
    config = make_config(model.preset, model.changes)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensor_shapes(config):
        num_bytes = 2 * prod(shape)
        if shards[-1] and size + num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += num_bytes
    norm_mean = mean_of_norms(config)
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        list(
            pool.map(
                lambda part: _write_shard(folder / part[0], part[1], norm_mean, device),
                zip(names, shards, strict=True),
            )
        )
    if len(shards) > 1:
        weight_map = {
            name: file for file, shard in zip(names, shards, strict=True) for name, _ in shard
        }
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "complete").touch()


def _write_shard(
    path: Path, shard: list[tuple[str, tuple[int, ...]]], norm_mean: float, device: torch.device
) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in shard:
        end = offset + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, shape in shard:
            values = _random_tensor(name, shape, norm_mean, device).view(torch.uint8).cpu()
            file.write(values.numpy().data)


def _random_tensor(
    name: str, shape: tuple[int, ...], norm_mean: float, device: torch.device
) -> Tensor:
    """Scaled by the fan-in, so that activations stay near 1, attention is neither flat nor a
    single key, and logits have a spread of about 2 however large the model is."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)
    if name.endswith("norm.weight"):
        return values.mul_(0.1).add_(norm_mean)
    if name.endswith("bias"):
        return values.mul_(0.3)
    gain = 1.0
    if "embed_tokens" in name or "lm_head" in name:
        gain = 2.0
    elif any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
        gain = 1.4
    return values.mul_(gain * shape[1] ** -0.5)


def run_ours(folder: Path, model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of loading, and with a prompt token_ids and logits. RuntimeError where it fails."""
    out = folder / "ours.pt"
    command = [sys.executable, "-m", "bench.full_size_ours", str(folder)]
    if model.prompt_len:
        command += [str(out), "--prompt-len", str(model.prompt_len)]
        command += ["--num-steps", str(model.num_steps)]
    command += ["--device", args.device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=OURS_TIMEOUT_S)
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise RuntimeError(f"pyserve's part ended with exit code {done.returncode}:\n{tail}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if model.prompt_len:
        figures |= torch.load(out, weights_only=True)
        out.unlink()
    return figures


def load_theirs(folder: Path, device: torch.device) -> PreTrainedModel:
    """transformers' model in bfloat16 with the folder's weights; sdpa caps no scores."""
    config = AutoConfig.from_pretrained(folder)
    attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"
    model, about = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation=attention, output_loading_info=True
    )
    model.set_experts_implementation("eager")  # others take no float64
    assert not about["missing_keys"] and not about["unexpected_keys"], about
    return model.to(device).eval()


@torch.inference_mode()
def their_logits(model: PreTrainedModel, token_ids: list[int], prompt_len: int) -> Tensor:
    """[num_tokens, vocab_size]: the first prompt_len tokens at once, the others one by one."""
    ids = torch.tensor([token_ids], device=model.device)
    # transformers 5.24 has renamed the argument. The model fills the cache in place.
    parameters = inspect.signature(model.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"
    arguments = {name: DynamicCache(config=model.config), "use_cache": True}
    rows = [model(ids[:, :prompt_len], **arguments).logits[0]]
    for position in range(prompt_len, len(token_ids)):
        rows.append(model(ids[:, position : position + 1], **arguments).logits[0])
    return torch.cat(rows)


@dataclass(frozen=True)
class Errors:
    """Of logits against exact ones, relative; top1 is the share of rows with the same argmax."""

    rms: float
    max: float
    top1: float

    @classmethod
    def of(cls, logits: Tensor, exact: Tensor) -> Errors:
        difference = logits.double() - exact
        return cls(
            rms=float(difference.norm() / exact.norm()),
            max=float(difference.abs().max() / exact.abs().max()),
            top1=float((logits.argmax(-1) == exact.argmax(-1)).double().mean()),
        )


def judge(name: str, ours: Errors, theirs: Errors) -> bool:
    """Print a line; True where the ratio rule holds. NaN never passes."""
    is_good = ours.rms <= 2 * theirs.rms + 1e-6 and ours.max <= 2 * theirs.max + 1e-6
    print(
        f"= {name}: rms {ours.rms:.2e} / {theirs.rms:.2e} ({ours.rms / theirs.rms:.2f}x), max "
        f"{ours.max:.2e} / {theirs.max:.2e} ({ours.max / theirs.max:.2f}x), top-1 "
        f"{ours.top1:.1%} / {theirs.top1:.1%}: {'ok' if is_good else 'FAILED'}",
        flush=True,
    )
    return is_good


def judge_loading(name: str, figures: dict[str, Any]) -> bool:
    anonymous = figures["anonymous_peak"] - figures["anonymous_before"]
    is_good = anonymous < MAX_ANONYMOUS_BYTES and figures["gb_per_s"] >= MIN_LOAD_GB_PER_S
    print(
        f"= load {name}: {figures['weight_bytes'] / 1e9:.1f} GB in {figures['load_s']:.2f} s, "
        f"{figures['gb_per_s']:.1f} GB/s; RssAnon +{anonymous / MIB:.0f} MiB, VmHWM "
        f"{figures['peak_rss'] / MIB:.0f} MiB (before {figures['rss_before'] / MIB:.0f}): "
        f"{'ok' if is_good else 'MISSED'}",
        flush=True,
    )
    return is_good


def check(
    name: str, folder: Path, model: Model, args: argparse.Namespace
) -> tuple[bool, dict[str, Any]]:
    """Everything about one model."""
    device = torch.device(args.device)
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def note(what: str) -> None:
        nonlocal clock
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[what], clock = now - clock, now

    if not (folder / "complete").exists():
        write_checkpoint(folder, model, device)
        _free()
    note("write")
    figures = run_ours(folder, model, args)
    note("ours")
    is_good = judge_loading(name, figures)
    if not args.judge_loading:
        is_good = True
    if not model.prompt_len:
        return is_good, figures
    token_ids, logits = figures.pop("token_ids"), figures.pop("logits").to(device)
    theirs = load_theirs(folder, device)
    note("load theirs")
    rough = their_logits(theirs, token_ids, model.prompt_len)
    note("theirs bfloat16")
    theirs.double()
    exact = their_logits(theirs, token_ids, len(token_ids))
    del theirs
    _free()
    note("theirs float64")
    for part, rows in (
        (f"prompt {model.prompt_len}", slice(None, model.prompt_len)),
        (f"{model.num_steps} steps", slice(model.prompt_len, None)),
    ):
        ours = Errors.of(logits[rows], exact[rows])
        plain = Errors.of(rough[rows], exact[rows])
        is_good &= judge(f"{name} {part}", ours, plain)
        figures[part] = {"ours": vars(ours), "transformers": vars(plain)}
    figures["logits_std"] = float(exact.std())
    del exact, rough, logits
    _free()
    print(
        f"{name}: logits have a spread of {figures['logits_std']:.2f}; seconds: "
        + ", ".join(f"{what} {value:.1f}" for what, value in seconds.items()),
        flush=True,
    )
    return is_good, {**figures, "seconds": seconds}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    logging.disable_progress_bar()
    results: dict[str, Any] = {}
    is_good = True
    for name in [args.write_only] if args.write_only else args.models:
        model = _changed(MODELS[name], args)
        folder = args.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if args.write_only:
                write_checkpoint(folder, model, torch.device(args.device))
                continue
            is_model_good, results[name] = check(name, folder, model, args)
            is_good &= is_model_good
        except (RuntimeError, OSError, AssertionError, subprocess.TimeoutExpired) as error:
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[-1500:]}", flush=True)
            results[name] = {"error": str(error)}
            is_good = False
            _free()
        if not args.write_only and name not in args.keep:
            shutil.rmtree(folder)
    about = environment(["torch", "transformers"])
    write_json(args.json, {"results": results, "environment": about})
    return 0 if is_good else 1


def _changed(model: Model, args: argparse.Namespace) -> Model:
    return Model(
        model.preset,
        {**model.changes, **dict(args.set)},
        model.prompt_len and (args.prompt_len or model.prompt_len),
        args.num_steps or model.num_steps,
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="where checkpoints are written, a folder each")
    add("--models", nargs="+", choices=[*MODELS], default=DEFAULT_MODELS)
    add("--keep", nargs="*", default=[], help="models whose folder is not removed afterwards")
    add("--write-only", choices=[*MODELS], help="write this model's folder and end")
    add("--device", choices=["cpu", "cuda"], default="cuda")
    add("--set", type=parse_override, action="append", default=[], metavar="FIELD=VALUE")
    add("--prompt-len", type=int, help="of every model")
    add("--num-steps", type=int, help="of every model")
    add("--judge-loading", action=argparse.BooleanOptionalAction, default=True)
    add("--json", type=Path, metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
