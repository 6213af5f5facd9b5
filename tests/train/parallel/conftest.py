import json
import random

import pytest


@pytest.fixture
def folder(tree, tmp_path):
    """A folder with the settings of a small run, for `parallel_cases`."""
    tree["model"]["attention_dropout"] = 0.0  # each process has random numbers of its own
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    for name, alphabet in (("letters", "abcdef"), ("digits", "012345")):
        (tmp_path / name).mkdir()
        chance = random.Random(name)
        words = ["".join(chance.choices(alphabet, k=3)) for _ in range(8)]
        for number in range(5):
            text = " ".join(chance.choices(words, k=400))
            (tmp_path / name / f"{number}.txt").write_text(text)
    return tmp_path
