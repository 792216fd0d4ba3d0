"""Trains the demo model from nothing and writes it as a Hugging Face directory.

    python -m bench.demo_train.train --out /tmp/demo --minutes 6

Documents are made up, tokenised and put on the device once; a batch has documents of one padded
length. The learning rate follows the larger of the two progresses, steps done and time spent, so a
run ends on time on any machine. Ends with the evaluation; its exit status is the evaluation's.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers

from bench.demo_train import data, evaluate
from bench.demo_train.tokenizer import VOCAB_SIZE, save_tokenizer, train_tokenizer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 576,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": data.MAX_LENGTH,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
# A low temperature: a model this small has few second-best answers worth giving.
GENERATION = {"do_sample": True, "temperature": 0.3, "eos_token_id": [2, 0], "pad_token_id": 0}
_WARMUP = 0.02
_DECAY = 0.5


class Batches:
    """Random batches of about `batch_tokens` tokens from arrays of several padded lengths."""

    def __init__(
        self,
        arrays: dict[int, tuple[np.ndarray, np.ndarray]],
        device: torch.device,
        *,
        batch_tokens: int,
        seed: int,
    ) -> None:
        self.batch_tokens, self.device = batch_tokens, device
        self.generator = torch.Generator().manual_seed(seed)
        self.arrays = {
            length: (torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
            for length, (ids, mask) in arrays.items()
        }
        self.lengths = list(self.arrays)
        self.num_tokens = {n: ids.numel() for n, (ids, _) in self.arrays.items()}
        self.weights = torch.tensor([float(n) for n in self.num_tokens.values()])
        self.order: dict[int, torch.Tensor] = {}

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int64 [rows, length], loss mask bool [rows, length])"""
        pick = torch.multinomial(self.weights, 1, generator=self.generator)
        length = self.lengths[int(pick)]
        ids, mask = self.arrays[length]
        count = max(1, min(self.batch_tokens // length, len(ids)))
        if len(self.order.get(length, ())) < count:
            order = torch.randperm(len(ids), generator=self.generator)
            self.order[length] = order.to(self.device)
        rows, self.order[length] = self.order[length].split(
            (count, len(self.order[length]) - count)
        )
        return ids[rows].long(), mask[rows]


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, a plateau, and a linear decay to zero over the second half."""
    if progress < _WARMUP:
        return peak * (progress / _WARMUP)
    return peak * min(1.0, (1.0 - progress) / _DECAY)


def optimizer_for(model: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=device.type == "cuda")


def loss_of(
    model: transformers.LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of the tokens that count; the head runs on their positions only."""
    with torch.autocast(ids.device.type, torch.bfloat16):
        embedded = model.model.embed_tokens(ids).bfloat16()  # and so the residual stream
        hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][mask[:, 1:]])
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][mask[:, 1:]])


def train(model: transformers.LlamaForCausalLM, batches: Batches, args: argparse.Namespace) -> None:
    """Runs until `args.steps` or `args.minutes`, whichever comes first."""
    optimizer = optimizer_for(model, batches.device)
    start = last = time.monotonic()
    step = tokens = 0
    losses: list[torch.Tensor] = []
    while True:
        elapsed = time.monotonic() - start
        progress = max(step / args.steps, elapsed / (60 * args.minutes))
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, args.learning_rate)
        ids, mask = batches.next()
        loss = loss_of(model, ids, mask)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
        step, tokens = step + 1, tokens + ids.numel()
        if step % args.report == 0:
            mean = float(torch.stack(losses).mean())  # waits for the device
            now = time.monotonic()
            rate = tokens / (now - last)
            print(
                f"step {step} {now - start:.0f} s loss {mean:.4f} {rate / 1e3:.0f} k tokens/s",
                flush=True,
            )
            if not math.isfinite(mean):
                raise SystemExit("the loss is not finite")
            losses, tokens, last = [], 0, now
            if now - start > (args.saved + 1) * 60:
                args.saved += 1
                save_model(model, args.out)


def save_model(model: transformers.LlamaForCausalLM, directory: Path) -> None:
    """config.json, generation_config.json and bfloat16 weights; the tied head is not stored."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, values in (("config.json", CONFIG), ("generation_config.json", GENERATION)):
        (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    state = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    path = directory / "model.safetensors"
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})


def make_batches(args: argparse.Namespace, device: torch.device) -> Batches:
    start = time.monotonic()
    if args.tokenizer:
        tokenizer = tokenizers.Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    else:
        texts = (text for text, _ in data.documents(-1, min(args.documents, 40_000)))
        tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, args.out)
    arrays = data.token_arrays(
        args.out / "tokenizer.json",
        args.seed,
        num_documents=args.documents,
        emphasis=args.emphasis,
        workers=args.workers,
    )
    batches = Batches(arrays, device, batch_tokens=args.batch_tokens, seed=args.seed)
    total = sum(batches.num_tokens.values())
    learned = sum(int(mask.sum()) for _, mask in arrays.values())
    print(
        f"{args.documents} documents, {total / 1e6:.1f} M padded tokens, {learned / 1e6:.1f} M "
        f"learned, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return batches


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training, without the rest")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--documents", type=int, default=1_500_000)
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="directory whose tokenizer.json to keep")
    parser.add_argument("--init", type=Path, help="directory whose weights to start from")
    parser.add_argument("--emphasis", nargs="*", default=[], choices=[*data.MAKERS, "weather"])
    parser.add_argument("--report", type=int, default=200, help="steps between two lines")
    parser.add_argument("--examples", type=int, default=200, help="of evaluation, a task")
    parser.add_argument("--smoke", action="store_true", help="a minute on a CPU; learns little")
    args = parser.parse_args(arguments)
    args.saved = 0
    if args.smoke:
        args.documents, args.batch_tokens, args.examples, args.report = 4000, 2048, 2, 10
        args.minutes = min(args.minutes, 0.4)
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    batches = make_batches(args, device)
    config = transformers.LlamaConfig(**{k: v for k, v in CONFIG.items() if k != "torch_dtype"})
    model = transformers.LlamaForCausalLM(config)
    if args.init:
        state = safetensors.torch.load_file(args.init / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict({name: value.float() for name, value in state.items()})
    model = model.to(device=device, dtype=torch.float32).train()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    train(model, batches, args)
    save_model(model, args.out)
    asker = evaluate.Model(args.out, args.device)
    passed = evaluate.report(
        asker, examples=args.examples, seed=args.seed, log=args.out / "wrong.txt"
    )
    return 0 if passed or args.smoke else 1


if __name__ == "__main__":
    sys.exit(main())
