import json

import pytest
from tiny_models import tiny_model

from moefit.checkpoint.tokenizer import read_tokenizer
from moefit.evaluate.loading import reference_path

WORDS = "red green blue old new small large round flat warm cold light".split()  # noqa: SIM905


def question(number: int, choices: int) -> dict:
    """Return a question whose choices have different numbers of tokens."""
    options = [" ".join(WORDS[number + i : number + 2 * i + 1]) for i in range(choices)]
    return {"query": f"Question: is it {WORDS[-number]}?", "choices": options, "gold": number % 2}


def context(number: int) -> dict:
    options = [f"The {WORDS[number]} box is {side} so the box" for side in ("left", "right here")]
    return {"context_options": options, "continuation": "moves on.", "gold": number % 2}


@pytest.fixture(scope="session")
def task_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = {
        "arc_easy": [question(number, 4) for number in range(5)],
        "hellaswag": [question(number, 3) for number in range(4)],
        "winogrande": [context(number) for number in range(5)],
    }
    for name, lines in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="session")
def dsmoe_folder(tmp_path_factory):
    """A tiny DS-MoE with a mixture of attention heads and a tokenizer, in float32."""
    tokenizer = read_tokenizer(reference_path())
    model = tiny_model(
        vocab_size=len(tokenizer),
        num_attention_experts=2,
        num_key_value_heads=2,
        mlp_type="gelu",
        router_hidden_size=6,
        max_position_embeddings=128,
    )
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
