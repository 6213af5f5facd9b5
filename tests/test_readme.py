"""What the README says works."""

import re
from pathlib import Path

import pytest

from moefit.evaluate.loading import reference_path

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_both_halves_have_an_example():
    assert len(EXAMPLES) == 2


@pytest.mark.skipif(
    not (reference_path() / "model.safetensors").is_file(), reason="no reference model yet"
)
@pytest.mark.parametrize("example", EXAMPLES, ids=["serve", "train"])
def test_the_python_examples_run(example, capsys):
    exec(example, {"__name__": "readme"})
    assert "def main():" in capsys.readouterr().out
