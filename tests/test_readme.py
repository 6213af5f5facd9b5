"""What the README says works."""

import re
from pathlib import Path

import pytest

from moefit.evaluate.loading import reference_path

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(
    not (reference_path() / "model.safetensors").is_file(), reason="no reference model yet"
)
def test_the_python_example_runs(capsys):
    example = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    exec(example[1], {"__name__": "readme"})
    assert "def main():" in capsys.readouterr().out
