import pytest

from moefit.dsmoe.card import model_card
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.presets import check_fields, field_names, preset, preset_names
from moefit.errors import ConfigError
from moefit.moe.routing import Rule

PAPER = [name for name in preset_names() if name.endswith("b")]
SIZES = ["tiny", "small"]


def test_preset_names_are_complete() -> None:
    kinds = {"dense": ["1b", "3b", "6b"], "smoe": ["1b", "1.5b", "5b"], "dsmoe": ["1b", "3b", "6b"]}
    paper = {f"{kind}-{size}" for kind, sizes in kinds.items() for size in sizes}
    small = {f"{kind}-{size}" for kind in kinds for size in SIZES}
    assert set(preset_names()) == paper | small
    assert len(preset_names()) == 15


@pytest.mark.parametrize("name", preset_names())
def test_preset_config_round_trips(name: str, tmp_path) -> None:
    config = preset(name)
    config.save_pretrained(tmp_path)
    again = DsMoeConfig.from_pretrained(tmp_path)
    assert {f: getattr(again, f) for f in field_names()} == {
        f: getattr(config, f) for f in field_names()
    }


@pytest.mark.parametrize("name", PAPER)
def test_presets_match_paper(name: str) -> None:
    config = preset(name)
    assert (config.mlp_type, config.vocab_size, config.tie_word_embeddings) == (
        "gelu",
        50257,
        False,
    )
    assert config.num_attention_heads == 32
    assert config.head_dim == {2048: 64, 3072: 96, 4096: 128}[config.hidden_size]
    assert config.num_key_value_heads == (2 if config.hidden_size == 2048 else 4)


@pytest.mark.parametrize(
    ("name", "attention_alpha", "mlp_alpha"),
    [("dsmoe-1b", 3.5e-4, 6.3e-4), ("dsmoe-3b", 2e-4, 4e-4), ("dsmoe-6b", 2e-4, 2e-4)],
)
def test_alpha_of_table_2(name: str, attention_alpha: float, mlp_alpha: float) -> None:
    config = preset(name)
    assert config.attention_mi_loss_coef == attention_alpha
    assert config.mlp_mi_loss_coef == mlp_alpha


@pytest.mark.parametrize("name", [n for n in preset_names() if n.startswith("smoe")])
def test_smoe_training_and_inference_rules_are_equal(name: str) -> None:
    config = preset(name)
    assert config.training_rule == config.inference_rule
    assert Rule.parse(config.training_rule).kind == "top_k"
    assert config.load_balancing_loss_coef > 0
    assert config.mlp_mi_loss_coef == config.attention_mi_loss_coef == 0


@pytest.mark.parametrize("name", [n for n in preset_names() if n.startswith("dense")])
def test_dense_has_no_routers_and_no_router_losses(name: str) -> None:
    config = preset(name)
    parameters = model_card(config).parameters
    assert parameters.mlp_routers == parameters.attention_routers == 0
    assert config.mlp_mi_loss_coef == config.load_balancing_loss_coef == 0


@pytest.mark.parametrize("size", SIZES)
def test_small_presets_differ_only_in_experts_and_routers(size: str) -> None:
    dense, sparse, ours = (
        model_card(preset(f"{kind}-{size}")) for kind in ("dense", "smoe", "dsmoe")
    )
    assert ours.parameters == sparse.parameters
    assert ours.total - ours.parameters.mlp_routers == dense.total


def test_tiny_presets_are_small() -> None:
    assert 1e6 < model_card(preset("dsmoe-tiny")).total < 2e6


def test_overrides_do_not_change_preset() -> None:
    changed = preset("dsmoe-tiny", num_hidden_layers=2, inference_rule="top_k:3")
    assert (changed.num_hidden_layers, changed.inference_rule) == (2, "top_k:3")
    assert preset("dsmoe-tiny").num_hidden_layers == 4


def test_field_names_exclude_inherited_fields() -> None:
    names = field_names()
    assert {"hidden_size", "num_experts", "inference_rule", "mlp_mi_loss_coef"} <= set(names)
    assert not {"transformers_version", "architectures", "dtype", "id2label"} & set(names)


def test_unknown_preset_suggests_names() -> None:
    with pytest.raises(ConfigError) as error:
        preset("dsmoe_small")
    assert "'dsmoe_small' is not a preset" in str(error.value)
    assert "did you mean 'dsmoe-small'?" in str(error.value)
    assert all(name in str(error.value) for name in preset_names())


def test_dissimilar_preset_lists_names() -> None:
    with pytest.raises(ConfigError, match=r"^'qqq' is not a preset; use one of dense-1b, "):
        preset("qqq")


def test_unknown_field_suggests_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'num_layers' .* did you mean 'num_hidden_layers'\?"):
        preset("dsmoe-tiny", num_layers=2)


def test_inherited_field_raises() -> None:
    with pytest.raises(ConfigError, match="'architectures' is not a field"):
        preset("dsmoe-tiny", architectures=["x"])


def test_contradictory_override_raises() -> None:
    with pytest.raises(ConfigError, match="the most that works is top_k:16"):
        preset("dsmoe-tiny", inference_rule="top_k:17")


def test_settings_without_preset_are_checked() -> None:
    check_fields({"hidden_size": 64})
    with pytest.raises(ConfigError, match=r"did you mean 'hidden_size'\?"):
        check_fields({"hiden_size": 64})
