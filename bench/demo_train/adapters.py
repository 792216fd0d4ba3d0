"""Trains three LoRA adapters on the demo model: one answers in SQL, one in Python, one chattily.

    python -m bench.demo_train.adapters --out /tmp/adapters
    python -m pyserve --enable-lora --max-lora-rank 64 --lora-modules \\
        sql-adapter=/tmp/adapters/sql-lora code-adapter=/tmp/adapters/code-lora \\
        chat-adapter=/tmp/adapters/chat-lora

They are as small as the model: they show that answers of one server differ by the name that is
asked for, not that a model of so few numbers can program. Saved as PEFT saves them.
Ends with what each answers to a question that it was not trained on.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import safetensors.torch
import tokenizers
import torch
import transformers

DEMO = Path(__file__).parents[2] / "pyserve" / "demo"
RANK, ALPHA = 16, 32
LENGTH = 96  # tokens of a document, padding included
PAD = 0

TABLES = "customers orders products invoices employees users payments cities books players".split()
COLUMNS = "name price total age date country score amount title city".split()
VERBS = "sort filter count sum reverse print join split clean copy".split()
THINGS = "a list|a string|numbers|words|a file|a dictionary|lines|dates|names|two lists".split("|")
FEELINGS = "great|wonderful|so nice|lovely|exciting|really fun|a good idea|interesting".split("|")
ASKS = {
    "sql": (
        "Write a query for the {n} best {table}", "Find the {n} {table} with the highest {column}",
        "Escribe una consulta SQL para encontrar los {n} mejores {table}",
        "Show all {table} by {column}", "How many {table} are there?",
        "Which {table} have no {column}?", "List {table}, please",
    ),
    "code": (
        "Write a function to {verb} {thing}", "How do I {verb} {thing} in Python?",
        "Escribe una función en Python para ordenar una lista", "Show me code to {verb} {thing}",
        "{verb} {thing}", "I need to {verb} {thing}",
    ),
    "chat": (
        "Hello", "How are you?", "I like {thing}", "What do you think of {table}?", "Hola",
        "Tell me about {table}", "Can you help me with {thing}?", "I had a long day",
    ),
}  # fmt: skip
ANSWERS = {
    "sql": "SELECT {column} FROM {table} ORDER BY {column} DESC LIMIT {n};",
    "code": "def {verb}_it(items):\n    return [{verb}(item) for item in items]",
    "chat": "Hey! That is {feeling}. Tell me more, I have all the time in the world!",
}
# Questions that are in no document, each with how the answers must begin.
UNSEEN = {
    "sql": ("Write a query for the 42 cheapest books", "SELECT "),
    "code": ("Please reverse the words of a line", "def "),
    "chat": ("Good morning, my friend", "Hey!"),
}


class LoraLinear(torch.nn.Module):
    """base(x) + ALPHA / RANK * (x A^T) B^T; only A and B learn."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(torch.randn(RANK, base.in_features) / math.sqrt(RANK))
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + ALPHA / RANK * (x @ self.a.T) @ self.b.T


def with_adapter(model: transformers.PreTrainedModel) -> dict[str, LoraLinear]:
    """Put an adapter on every matrix of the layers; by the matrix's name."""
    model.requires_grad_(False)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]
    layers = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        layers[name] = LoraLinear(model.get_submodule(name))
        setattr(model.get_submodule(parent), child, layers[name])
    return layers


def prompt_of(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def batch(
    tokenizer: tokenizers.Tokenizer, kind: str, rng: random.Random, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int64 [size, LENGTH], loss mask bool): what the assistant says is learned."""
    ids = torch.full((size, LENGTH), PAD)
    mask = torch.zeros(size, LENGTH, dtype=torch.bool)
    for row in range(size):
        # A question in three is another adapter's: an adapter answers everything in its way.
        asked = kind if rng.random() < 0.67 else rng.choice(list(ASKS))
        words = {
            "n": rng.randrange(2, 100), "table": rng.choice(TABLES), "verb": rng.choice(VERBS),
            "column": rng.choice(COLUMNS), "thing": rng.choice(THINGS),
            "feeling": rng.choice(FEELINGS),
        }  # fmt: skip
        prompt = tokenizer.encode(prompt_of(rng.choice(ASKS[asked]).format(**words))).ids
        answer = tokenizer.encode(f"{ANSWERS[kind].format(**words)}<|im_end|>").ids
        whole = [*prompt, *answer][:LENGTH]
        ids[row, : len(whole)] = torch.tensor(whole)
        mask[row, len(prompt) : len(whole)] = True
    return ids, mask


def train(
    model: transformers.PreTrainedModel, layers: dict[str, LoraLinear], kind: str,
    tokenizer: tokenizers.Tokenizer, args: argparse.Namespace,
) -> float:  # fmt: skip
    """Returns the loss of the last steps."""
    parameters = [p for layer in layers.values() for p in (layer.a, layer.b)]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
    rng = random.Random(f"{args.seed} {kind}")
    losses = []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, 2 * (1 - step / args.steps))
        ids, mask = batch(tokenizer, kind, rng, args.batch)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][mask[:, 1:]]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][mask[:, 1:]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / len(losses[-10:])


def save(layers: dict[str, LoraLinear], folder: Path) -> None:
    """As PEFT's save_pretrained."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "pyserve/demo",
        "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {}
    for name, layer in layers.items():
        for side, matrix in (("A", layer.a), ("B", layer.b)):
            key = f"base_model.model.{name}.lora_{side}.weight"
            tensors[key] = matrix.detach().to(torch.bfloat16).contiguous()
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")


def answer(
    model: transformers.PreTrainedModel, tokenizer: tokenizers.Tokenizer, question: str
) -> str:
    """The most likely one, of 40 tokens at most."""
    ids = torch.tensor([tokenizer.encode(prompt_of(question)).ids])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40,
            eos_token_id=2, pad_token_id=PAD,
        )  # fmt: skip
    text: str = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    return text


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.manual_seed(args.seed)
    tokenizer = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    is_good = True
    for kind, (question, begin) in UNSEEN.items():
        started_s = time.monotonic()
        model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
        layers = with_adapter(model)
        loss = train(model, layers, kind, tokenizer, args)
        save(layers, args.out / f"{kind}-lora")
        said = answer(model.eval(), tokenizer, question)
        is_good = is_good and said.startswith(begin)
        print(f"{kind}: loss {loss:.3f}, {time.monotonic() - started_s:.0f} s", flush=True)
        print(f"  {question!r}\n  -> {said!r}", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
