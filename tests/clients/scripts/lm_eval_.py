"""lm-eval by its local-completions: likelihoods of prompts given as token ids, and generation."""

import json
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import lm_eval
from checks import BASE_URL, MODEL, main
from lm_eval.tasks import TaskManager

DEMO = Path(__file__).resolve().parents[3] / "pyserve" / "demo"
QUESTIONS = [
    ("What is the capital of France?", [" The capital of France is Paris.", " xq zzv kkw"], 0),
    ("What is the capital of France?", [" zz qqx wkk", " The capital of France is Paris."], 1),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
output_type: {kind}
test_split: test
doc_to_text: "{{{{question}}}}"
{more}
"""
CHOICES = """doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]"""
ROLLING = """doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]"""
WRITTEN = """doc_to_target: "Paris"
generation_kwargs: {until: ["."], max_gen_toks: 12, temperature: 0}
metric_list: [{metric: exact_match}]"""


def evaluate(kind, more, *, as_ids):
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data.json")
        names = ("question", "choices", "answer")
        rows = [dict(zip(names, row, strict=True)) for row in QUESTIONS]
        data.write_text("\n".join(map(json.dumps, rows)))
        task = TASK.format(name=kind, data=data, kind=kind, more=more)
        Path(folder, "task.yaml").write_text(task)
        found = lm_eval.simple_evaluate(
            model="local-completions",
            model_args={
                "model": MODEL,
                "base_url": f"{BASE_URL}/completions",
                "tokenizer": str(DEMO),
                "tokenized_requests": as_ids,
                "max_length": 512,
            },
            tasks=[kind],
            task_manager=TaskManager(include_path=folder, include_defaults=False),
            bootstrap_iters=0,
        )
        return found["results"][kind], found["samples"][kind]


def multiple_choice():
    for as_ids in (True, False):
        results, samples = evaluate("multiple_choice", CHOICES, as_ids=as_ids)
        assert results["acc,none"] == 1.0, results
        assert len(samples) == len(QUESTIONS)


def rolling():
    results, _ = evaluate("loglikelihood_rolling", ROLLING, as_ids=True)
    assert results["word_perplexity,none"] > 1, results


def generation():
    for as_ids in (True, False):
        _, samples = evaluate("generate_until", WRITTEN, as_ids=as_ids)
        assert all(sample["resps"][0][0].strip() for sample in samples), samples


main(multiple_choice, rolling, generation)
