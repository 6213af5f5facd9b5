import io

import pytest
from matplotlib.image import imread
from rich.console import Console

from moefit import demo
from moefit.evaluate.perplexity import Score


def made_up(rule, share, perplexity):
    return Score(
        rule=rule, loss=1.0, perplexity=perplexity, bits_per_byte=1.0, tokens=10, mlp_experts=2.0,
        attention_experts=1.0, active_parameters=10, active_share=share, tokens_per_second=1.0,
    )  # fmt: skip


def test_the_picture(tmp_path):
    scores = [made_up("dense", 1.0, 10.0), made_up("top_k:2", 0.3, 11.0)]
    demo.draw(scores, scores, tmp_path / "demo.png")
    assert imread(tmp_path / "demo.png").shape[0] > 400


@pytest.mark.slow
def test_the_whole_story(tmp_path):
    console = Console(file=io.StringIO(), width=120)
    result = demo.run(tmp_path / "demo", seconds=5, console=console)
    assert result["training"]["steps"] >= 30
    assert {score["rule"] for score in result["reference"]} >= {"dense", "top_k:4"}
    assert result["answer"]["text"].startswith(demo.PROMPT)
    assert 0.2 < result["answer"]["active_share"] < 0.4
    assert (tmp_path / "demo" / "demo.png").is_file()
    again = demo.run(tmp_path / "demo", seconds=5, console=console)  # a second visit works too
    assert again["training"]["steps"] >= 30
