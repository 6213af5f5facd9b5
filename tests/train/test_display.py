import io

from rich.console import Console

from moefit.train.display import display

INFO = {
    "parameters": 1e6, "train_tokens": 2e6, "epochs": 0.5, "precision": "fp32", "device": "cpu",
    "threads": 2, "peak_flops": 1e11,
}  # fmt: skip
VALUES = {"loss": 3.21, "tokens_per_second": 4567.0, "mfu": 0.34}


def test_display_shows_progress():
    out = io.StringIO()
    with display(Console(file=out, width=160, force_terminal=True, color_system=None)) as callback:
        callback.on_prepare("reading", 100, None)
        callback.on_prepare("tokenising", 100, 1000)
        callback.on_message("resuming from runs/[a]/[/b]")
        callback.on_start(step=0, steps=10, info=INFO)
        callback.on_step(10, {**VALUES, "held_out_loss": 3.5, "seconds": 1.0})
    text = out.getvalue()
    for words in (
        "1.00 M parameters",
        "runs/[a]/[/b]",
        "loss 3.210",
        "4,567 tok/s",
        "MFU 34%",
        "3.500",
    ):
        assert words in text


def test_display_prints_lines_without_terminal():
    out = io.StringIO()
    with display(Console(file=out, width=160, force_terminal=False)) as callback:
        callback.on_start(step=0, steps=10, info=INFO)
        for step, seconds in ((1, 1.0), (2, 31.0), (3, 32.0), (4, 62.0)):
            callback.on_step(step, {**VALUES, "seconds": seconds})
    lines = [line for line in out.getvalue().splitlines() if line.startswith("step")]
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 4"]
