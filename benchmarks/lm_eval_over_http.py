"""Compare lm-eval's scores over HTTP with those in process; they must be the same.

    python benchmarks/lm_eval_over_http.py MODEL QUESTIONS.jsonl ... [--limit 100] [--save]

QUESTIONS: lines with query, choices and gold (multiple choice by log-likelihood); the file's name
is the task's. Starts moefit's server; lm-eval's `hf` backend scores the same model.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import record
import torch

from moefit.evaluate.loading import load_full_model, locate

# Optional, and without type annotations.
evaluator: Any = importlib.import_module("lm_eval.evaluator")
huggingface: Any = importlib.import_module("lm_eval.models.huggingface")
tasks: Any = importlib.import_module("lm_eval.tasks")
PORT = 8732
URL = f"http://127.0.0.1:{PORT}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("questions", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--memory", help="the server's budget")
    parser.add_argument("--save", action="store_true")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        names = [write_task(Path(folder), path, given.limit) for path in given.questions]
        found = tasks.TaskManager(include_path=folder, include_defaults=False)
        over_http = served(given, names, found)
        in_process = scored(hf_backend(given.model), names, found)
    results = {
        name: compare(over_http[name], in_process[name], over_http["seconds"]) for name in names
    }
    print(json.dumps(results, indent=1))
    if given.save:
        notes = "Multiple choice by log-likelihood of each choice; computed in fp32, exact."
        print(record.write("lm-eval-over-http", results, notes=notes))


def write_task(folder: Path, path: Path, limit: int) -> str:
    """Write an lm-eval task with the first questions of a file and return its name."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:limit]]
    data = folder / f"{path.stem}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / f"{path.stem}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return path.stem


def hf_backend(model: str) -> Any:
    loaded, tokenizer = load_full_model(model, dtype=torch.float32)
    return huggingface.HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=1)


def served(given: argparse.Namespace, names: list[str], found: Any) -> dict[str, Any]:
    budget = ["--memory", given.memory] if given.memory else []
    moefit = str(Path(sys.executable).parent / "moefit")
    command = [moefit, "serve", given.model, "--port", str(PORT), "--dtype", "float32", *budget]
    server = subprocess.Popen(command)
    try:
        until_ready(server)
        with urllib.request.urlopen(f"{URL}/v1/models") as answer:
            name = json.load(answer)["data"][0]["id"]
        arguments = {
            "model": name,
            "base_url": f"{URL}/v1/completions",
            "tokenizer": str(locate(given.model)),
            "tokenizer_backend": "huggingface",
            "num_concurrent": 4,
            "max_retries": 2,
            "tokenized_requests": True,
        }
        text = ",".join(f"{key}={value}" for key, value in arguments.items())
        began = time.perf_counter()
        scores = scored("local-completions", names, found, model_args=text)
        return {**scores, "seconds": time.perf_counter() - began}
    finally:
        server.terminate()
        server.wait(60)


def until_ready(server: Any) -> None:
    for _ in range(300):
        if server.poll() is not None:
            raise SystemExit("the server ended before it was ready")
        try:
            with urllib.request.urlopen(f"{URL}/health") as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(1)
    raise SystemExit("the server did not become ready")


def scored(model: Any, names: list[str], found: Any, **settings: Any) -> dict[str, Any]:
    """Return accuracies and the log-likelihoods of each question's choices, by task."""
    told = evaluator.simple_evaluate(
        model=model, tasks=names, task_manager=found, bootstrap_iters=0, **settings
    )
    return {
        name: {
            "acc": told["results"][name]["acc,none"],
            "acc_norm": told["results"][name]["acc_norm,none"],
            "questions": [
                [
                    float(choice[0][0] if isinstance(choice[0], tuple | list) else choice[0])
                    for choice in one["resps"]
                ]
                for one in sorted(told["samples"][name], key=lambda one: one["doc_id"])
            ],
        }
        for name in names
    }


def compare(http: dict[str, Any], own: dict[str, Any], seconds: float) -> dict[str, Any]:
    questions = list(zip(http["questions"], own["questions"], strict=True))
    pairs = [pair for one in questions for pair in zip(*one, strict=True)]
    return {
        "over HTTP": {key: http[key] for key in ("acc", "acc_norm")},
        "in process": {key: own[key] for key in ("acc", "acc_norm")},
        "log-likelihoods": len(pairs),
        "questions": len(questions),
        "questions with another choice": sum(
            a.index(max(a)) != b.index(max(b)) for a, b in questions
        ),
        "largest difference, nats": max(abs(a - b) for a, b in pairs),
        "seconds over HTTP, all tasks": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
