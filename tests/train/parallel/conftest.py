import json

import pytest


@pytest.fixture
def folder(tree, tmp_path):
    """A folder with the settings of a small run, for `parallel_cases`."""
    tree["model"]["attention_dropout"] = 0.0  # each process has random numbers of its own
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    return tmp_path
