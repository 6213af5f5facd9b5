import time

import pytest

from moefit.cli.options import read_options
from moefit.errors import ConfigError
from moefit.train.config import TrainConfig, load_yaml, read_config
from moefit.train.settings import OptimizerConfig


def test_defaults_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 500\nmodel: {preset: dsmoe-tiny}\n")
    overrides = ["optimizer.lr=3e-4", "model.hidden_size=64", "data.sources=[a, b]"]
    config = read_config(path, overrides)
    assert config.steps == 500
    assert config.optimizer.lr == 3e-4
    assert config.model.preset == "dsmoe-tiny"
    assert config.model.settings == {"hidden_size": 64}
    assert config.data.sources == ("a", "b")
    assert read_config(None, []).data.sources == ("stdlib",)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimizer.leraning_rate=1", ["optimizer.leraning_rate", "unknown key", "known keys"]),
        ("stepss=1", ["stepss", "unknown key", "did you mean steps?"]),
        ("steps=0", ["steps", "0"]),
        ("steps=many", ["steps", "many"]),
        ("optimizer.lr=nan", ["optimizer.lr"]),
        ("loss.mlp_mi=-1", ["loss.mlp_mi", "-1"]),
        ("steps", ["not an override", "key=value"]),
        ("steps.x.y=1", ["steps"]),
        ("precision=fp8", ["precision", "fp8"]),
        ("optimizer.warmup_steps=1000", ["warmup_steps=1000", "the most that works is 999"]),
        ("steps=[", ["not a YAML value"]),
        ("out=2024-13-45", ["2024-13-45", "not a YAML value"]),
        ("seed=-1", ["seed", "greater than or equal to 0", "-1"]),
        ("seed=99999999999999999999", ["seed", "less than"]),
        ("optimizer.betas=[1.5,0.9]", ["optimizer.betas.0", "less than 1", "1.5"]),
        ("optimizer.betas=[0.9,-1]", ["optimizer.betas.1", "-1"]),
    ],
)
def test_invalid_overrides_raise(override, words):
    with pytest.raises(ConfigError) as caught:
        read_config(None, [override])
    for word in words:
        assert word in str(caught.value)


def test_override_below_a_value_raises(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 500\n")
    with pytest.raises(ConfigError, match="not a group"):
        read_config(path, ["steps.more=1"])


def test_scientific_notation_is_a_number(tmp_path) -> None:
    """YAML 1.1 reads 1e-6 as text."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "model:\n"
        "  rms_norm_eps: 1e-6\n"
        "  routed_scaling_factor: 2e1\n"
        "  initializer_range: -.5E+3\n"
        "  rope_parameters: {rope_theta: 1.e4, factors: [1e0, 2]}\n"
    )
    assert read_config(path, ["model.z=3e-4"]).model.settings == {
        "rms_norm_eps": 1e-6,
        "routed_scaling_factor": 20.0,
        "initializer_range": -500.0,
        "rope_parameters": {"rope_theta": 1e4, "factors": [1.0, 2]},
        "z": 3e-4,
    }


@pytest.mark.parametrize("text", ["'123'", "'1e5'", "nan", "inf", "e5", "1e", "1e5x", "v1e5"])
def test_quoted_numbers_stay_text(tmp_path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{text_key: {text}}}\n")
    assert read_config(path, []).data.text_key == text.strip("'")
    assert read_config(None, [f"data.text_key={text}"]).data.text_key == text.strip("'")


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "\x00", "out: 2024-13-45"])
def test_invalid_yaml_raises(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        read_config(path, [])


def test_missing_config_raises(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nothing\.yaml"):
        read_config(tmp_path / "nothing.yaml", [])


def test_sparse_rule_is_validated():
    config = read_config(None, ["sparse.rule=top_k:4", "sparse.share=0.25"])
    assert (config.sparse.rule, config.sparse.share, config.sparse.start) == ("top_k:4", 0.25, 0.0)
    with pytest.raises(ConfigError, match=r"sparse\.rule: .*'best:4' is not an inference rule"):
        read_config(None, ["sparse.rule=best:4"])
    for given in ("share=0", "share=1.5", "start=2", "rate=1"):
        with pytest.raises(ConfigError, match=r"sparse\."):
            read_config(None, [f"sparse.{given}"])


def test_reversed_mi_ramp_raises():
    with pytest.raises(ConfigError, match="ends before it starts"):
        read_config(None, ["loss.mi_ramp=[0.9, 0.5]"])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    BOMB: "more than 10,000 values with aliases expanded",
    "a: " + "[" * 100_000: "nested more than 32 levels",
    "a: " + "{a: " * 50 + "1": "nested more than 32 levels",
    "\n".join("  " * n + "a:" for n in range(300)): "nested more than 32 levels",
    "a: &a [*a]": "refers to a value that contains it",
    "a: &a {b: *a}": "refers to a value that contains it",
    "x" * 300_000: "at most 262,144",
    "a: 1\nb: 2\na: 3": "the field 'a' occurs twice, on lines 1 and 3",
    "a: [{b: 1, b: 2}]": "the field 'b' occurs twice, on one line",
    "a: !!bool x": "it is not YAML: KeyError",
    "a: !!int x": "it is not YAML",
    "a: !!timestamp x": "it is not YAML",
    "a: !!python/object/apply:os.system [ls]": "it is not YAML",
    "? [a]\n: b": "it is not YAML",
    "a: *b": "it is not YAML",
    "a: \x07": "it is not YAML",
    "a: " + "9" * 5000: "it is not YAML",
}


@pytest.mark.parametrize("text", BAD_YAML, ids=lambda text: repr(text[:20]))
def test_oversized_yaml_raises(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=BAD_YAML[text]):
        read_config(path, [])
    with pytest.raises(ConfigError, match=BAD_YAML[text]):
        read_options(path, ["a"])
    assert time.monotonic() - begin < 10


def test_small_aliases_are_accepted() -> None:
    text = "a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}\nf: &f 3\ng: *f"
    assert load_yaml(text) == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}, "f": 3, "g": 3}
    nested = "base: &b {x: 1}\ndeep:\n  inner: &a\n    <<: *b\n    x: 2\ntop:\n  <<: *a\n"
    merged = {"base": {"x": 1}, "deep": {"inner": {"x": 2}}, "top": {"x": 2}}
    assert load_yaml(nested) == merged, "a merged field is no repeated one, however it is nested"


@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0), (20, 2), (100, 10), (999, 99), (1000, 100), (4000, 100)]
)
def test_default_warmup_depends_on_steps(steps: int, warmup: int) -> None:
    overrides = [f"steps={steps}", "optimizer.lr=3e-4"]
    assert read_config(None, overrides).optimizer.warmup_steps == warmup
    assert TrainConfig(steps=steps).optimizer.warmup_steps == warmup
    given = TrainConfig(steps=steps, optimizer=OptimizerConfig(lr=3e-4))
    assert (given.optimizer.warmup_steps, given.optimizer.lr) == (warmup, 3e-4)


def test_steps_accept_integral_float() -> None:
    config = read_config(None, ["steps=2e1"])
    assert (config.steps, config.optimizer.warmup_steps) == (20, 2)


def test_single_source_is_accepted() -> None:
    data = read_config(None, ["data.sources=book.txt", "data.held_out=other.txt"]).data
    assert (data.sources, data.held_out) == (("book.txt",), ("other.txt",))
    with pytest.raises(ConfigError, match=r"data\.sources"):
        read_config(None, ["data.sources=3"])


def test_given_warmup_must_be_below_steps() -> None:
    assert read_config(None, ["steps=20", "optimizer.warmup_steps=19"]).optimizer.warmup_steps == 19
    for overrides in (["steps=20", "optimizer.warmup_steps=100"], ["optimizer.warmup_steps=1000"]):
        with pytest.raises(
            ConfigError, match=r"^configuration: optimizer.warmup_steps=.* is not below"
        ):
            read_config(None, overrides)


def test_fewer_steps_than_a_files_warmup_shorten_it_with_a_warning(tmp_path, caplog) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("steps: 1000\noptimizer: {warmup_steps: 50, lr: 0.01}\n")
    config = read_config(file, ["steps=20"])
    assert (config.steps, config.optimizer.warmup_steps, config.optimizer.lr) == (20, 2, 0.01)
    assert "warmup_steps=50 leaves nothing of steps=20" in caplog.text
    caplog.clear()
    assert read_config(file, ["steps=51"]).optimizer.warmup_steps == 50
    assert read_config(file, ["steps=20", "optimizer.warmup_steps=5"]).optimizer.warmup_steps == 5
    assert not caplog.text
    with pytest.raises(ConfigError, match="the most that works is 19"):
        read_config(file, ["steps=20", "optimizer.warmup_steps=20"])
    file.write_text("steps: 20\noptimizer: {warmup_steps: 50}\n")
    with pytest.raises(ConfigError, match="the most that works is 19"):
        read_config(file, [])
