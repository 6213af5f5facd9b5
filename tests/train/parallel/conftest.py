import json
import random

import pytest


def _write_cases(folder, tree):
    """Write the settings of a small run, and two texts, for `parallel_cases`."""
    tree["model"]["attention_dropout"] = 0.0  # each process has random numbers of its own
    (folder / "tree.json").write_text(json.dumps(tree))
    for name, alphabet in (("letters", "abcdef"), ("digits", "012345")):
        (folder / name).mkdir()
        chance = random.Random(name)
        words = ["".join(chance.choices(alphabet, k=3)) for _ in range(8)]
        for number in range(5):
            text = " ".join(chance.choices(words, k=400))
            (folder / name / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture
def folder(tree, tmp_path):
    """A folder with the settings of a small run, for `parallel_cases`."""
    return _write_cases(tmp_path, tree)


@pytest.fixture(scope="module")
def shared_folder(make_tree, tmp_path_factory):
    """The same for all tests of a module."""
    folder = tmp_path_factory.mktemp("parallel")
    return _write_cases(folder, make_tree(folder))
