import pytest

from moefit.errors import ConfigError
from moefit.train.config import read_config


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
        ("steps", ["no override", "key=value"]),
        ("steps.x.y=1", ["steps"]),
        ("precision=fp8", ["precision", "fp8"]),
        ("optimizer.warmup_steps=1000", ["warmup_steps=1000", "the most that works is 999"]),
        ("steps=[", ["not a YAML value"]),
    ],
)
def test_what_is_wrong_is_named(override, words):
    with pytest.raises(ConfigError) as caught:
        read_config(None, [override])
    for word in words:
        assert word in str(caught.value)


def test_an_override_below_a_value(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 500\n")
    with pytest.raises(ConfigError, match="not a group"):
        read_config(path, ["steps.more=1"])


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "\x00"])
def test_broken_yaml(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        read_config(path, [])


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*nothing\.yaml"):
        read_config(tmp_path / "nothing.yaml", [])
