"""The model card compared with modules, and with the numbers in DS-MoE's paper.

The paper does not describe norms and biases. Here, models have RMSNorm and no biases except in the
router's hidden layer, and dense totals are 0.05 to 0.23% (2.3 to 8.8M) above the paper's; omitting
these parts would change 0.6M at most. The tolerance of 0.35% covers this and the rounding to
millions.
"""

import io
import json

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from moefit.cli.models import card_rows, card_table
from moefit.dsmoe.card import ModelCard, model_card
from moefit.dsmoe.config import DsMoeConfig
from moefit.dsmoe.model import DsMoeForCausalLM
from moefit.dsmoe.presets import preset, preset_names
from moefit.errors import ConfigError
from moefit.moe.routing import Rule
from moefit.serve.memory.activations import kv_bytes_per_token

DENSE = Rule(kind="dense")
THRESHOLD = Rule.parse("threshold:0.48")
MEAN_TOP_K = Rule.parse("threshold_top_k:0.48")
MILLION = 10**6
PAPER_TOLERANCE = 0.0035


def top_k(k: int) -> Rule:
    return Rule(kind="top_k", k=k)


def part_of(name: str) -> str:
    for part, marks in {
        "embeddings": ["embed_tokens"],
        "head": ["lm_head"],
        "attention_routers": ["self_attn.gate"],
        "mlp_routers": ["mlp.gate."],
        "mlp_experts": ["mlp.experts"],
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "norms": ["norm"],
    }.items():
        if any(mark in name for mark in marks):
            return part
    raise AssertionError(name)


def measured_parts(config: DsMoeConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = DsMoeForCausalLM(config)
    model.tie_weights()
    counts = dict.fromkeys(model_card(config).parameters.as_dict(), 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    return counts


VARIANTS = {
    "moa": preset("dsmoe-tiny", num_attention_experts=2),
    "moa, gelu, mlp router": preset(
        "dsmoe-tiny", num_attention_experts=2, mlp_type="gelu", router_hidden_size=24
    ),
    "head_dim of its own, untied": preset("smoe-tiny", head_dim=48, tie_word_embeddings=False),
    "no qk_norm": preset("dense-tiny", qk_norm=False),
}


@pytest.mark.parametrize("name", [*preset_names(), *VARIANTS])
def test_card_equals_module_parameters(name: str) -> None:
    config = VARIANTS[name] if name in VARIANTS else preset(name)
    assert model_card(config).parameters.as_dict() == measured_parts(config)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("dense-1b", 1017),
        ("dense-3b", 2705),
        ("dense-6b", 6186),
        ("dsmoe-1b", 1067),
        # Tables 1 and 5 disagree here (2846 and 6343 in Table 1); 5's fit the routers.
        ("dsmoe-3b", 2793),
        ("dsmoe-6b", 6338),
    ],
)
def test_totals_match_paper(name: str, millions: int) -> None:
    total = model_card(preset(name)).total_without_embeddings
    assert total == pytest.approx(millions * MILLION, rel=PAPER_TOLERANCE)


@pytest.mark.parametrize(
    ("size", "millions", "slack"),
    # Each printed gap is a difference of two numbers rounded to a million.
    [("1b", 1067 - 1017, 1), ("3b", 2793 - 2705, 1), ("6b", 6338 - 6186, 1)],
)
def test_routers_explain_difference_to_dense(size: str, millions: int, slack: int) -> None:
    ours, dense = (model_card(preset(f"{kind}-{size}")) for kind in ("dsmoe", "dense"))
    gap = ours.total_without_embeddings - dense.total_without_embeddings
    assert gap == pytest.approx(millions * MILLION, abs=slack * MILLION)
    assert gap == ours.parameters.mlp_routers + ours.parameters.attention_routers


@pytest.mark.parametrize(
    ("name", "millions"), [("smoe-1b", 1042), ("smoe-1.5b", 1445), ("smoe-5b", 4911)]
)
def test_smoe_totals_match_paper_with_wider_router(name: str, millions: int) -> None:
    # With the linear router of the preset 1.5 to 2.2% are missing: as much as routers with one
    # hidden layer weigh, 512 wide at 1B, and 1024 (or two of 512) at 5B.
    linear = model_card(preset(name)).total_without_embeddings
    assert 0.014 < 1 - linear / (millions * MILLION) < 0.022
    width = 1024 if name == "smoe-5b" else 512
    wide = model_card(preset(name, router_hidden_size=width)).total_without_embeddings
    assert wide == pytest.approx(millions * MILLION, rel=PAPER_TOLERANCE)


@pytest.mark.parametrize("name", ["smoe-1b", "smoe-1.5b"])
def test_smoe_1b_active(name: str) -> None:
    # 1% instead of the usual tolerance: 419 lies between the linear router's 416 and the 441 of
    # the router that the printed totals fit. The two numbers can't be had from one shape.
    assert model_card(preset(name)).active(top_k(2)) == pytest.approx(419 * MILLION, rel=0.01)


def test_smoe_5b_active() -> None:
    wide = model_card(preset("smoe-5b", router_hidden_size=1024))
    assert wide.active(top_k(2)) == pytest.approx(1212 * MILLION, abs=MILLION)
    # The preset's linear router is 88M smaller.
    assert model_card(preset("smoe-5b")).active(top_k(2)) == pytest.approx(1125 * MILLION, rel=1e-3)


@pytest.mark.parametrize(("name", "k", "millions"), [("dsmoe-3b", 6, 1039), ("dsmoe-6b", 4, 2043)])
def test_active_of_table_5(name: str, k: int, millions: int) -> None:
    # 4%: ours are 41M and 72M above the printed ones, about what one of the two routers weighs
    # (44M, 76M). Table 6, with the same K and both routers, agrees to 0.03% (next test), so the
    # paper counted differently in its two tables.
    card = model_card(preset(name))
    assert card.active(top_k(k)) == pytest.approx(millions * MILLION, rel=0.04)
    without_one_router = card.active(top_k(k)) - card.parameters.attention_routers
    assert without_one_router == pytest.approx(millions * MILLION, rel=PAPER_TOLERANCE)


def scaled(width: int, kind: str) -> ModelCard:
    """A model of Table 6: 36 layers, 32 heads, 4 heads of keys and values."""
    shape = {"hidden_size": width, "num_hidden_layers": 36}
    if kind == "dense":
        return model_card(preset("dense-6b", intermediate_size=4 * width, **shape))
    if kind == "dsmoe":
        return model_card(preset("dsmoe-6b", intermediate_size=width // 8, **shape))
    return model_card(
        preset("smoe-5b", intermediate_size=width // 2, router_hidden_size=1024, **shape)
    )


TABLE_6 = [  # width; dense total; SMoE total, active; DS-MoE total, active; in millions
    (5120, 9667, 17413, 4201, 9857, 3257),
    (6144, 13923, 25029, 6004, 14149, 4645),
    (7168, 18951, 34023, 8127, 19216, 6278),
]


@pytest.mark.parametrize(("width", "dense", "smoe", "smoe_on", "dsmoe", "dsmoe_on"), TABLE_6)
def test_table_6(
    width: int, dense: int, smoe: int, smoe_on: int, dsmoe: int, dsmoe_on: int
) -> None:
    plain, sparse, ours = (scaled(width, kind) for kind in ("dense", "smoe", "dsmoe"))
    gap = ours.total_without_embeddings - plain.total_without_embeddings
    assert plain.total_without_embeddings == pytest.approx(dense * MILLION, rel=1e-3)
    assert ours.total_without_embeddings == pytest.approx(dsmoe * MILLION, rel=1e-3)
    # 190, 226, 265: the middle one is 1.3M below ours, the others within rounding.
    assert gap == pytest.approx((dsmoe - dense) * MILLION, abs=1.5 * MILLION)
    assert ours.active(top_k(4)) == pytest.approx(dsmoe_on * MILLION, rel=3e-4)
    assert sparse.total_without_embeddings == pytest.approx(smoe * MILLION, rel=3e-4)
    assert sparse.active(top_k(2)) == pytest.approx(smoe_on * MILLION, rel=3e-4)


@pytest.mark.parametrize(
    ("name", "millions"), [("dsmoe-1b", 439), ("dsmoe-3b", 934), ("dsmoe-6b", 1813)]
)
def test_active_of_table_3_is_possible(name: str, millions: int) -> None:
    # The means behind Table 3 aren't printed, only that attention kept over 60% of its experts.
    # So: between 60% and all of them, the MLP mean that is left over is between 1 and a third.
    card = model_card(preset(name))

    def mlp_mean(attention: float) -> float:
        at_one = card.active(THRESHOLD, 1, attention)
        per_expert = card.parameters.mlp_experts / card.num_experts
        return 1 + (millions * MILLION - at_one) / per_expert

    most, fewest = mlp_mean(0.6 * card.num_attention_experts), mlp_mean(card.num_attention_experts)
    assert 1 < fewest < most < card.num_experts / 3
    assert card.active(THRESHOLD, most, 0.6 * card.num_attention_experts) == pytest.approx(
        millions * MILLION
    )


def test_weight_bytes_of_table_7() -> None:
    # vLLM's report of weights in bf16: 12.3 GiB dense, 12.6 GiB DS-MoE.
    assert model_card(preset("dense-6b")).weight_bytes("bfloat16") / 2**30 == pytest.approx(
        12.3, abs=0.05
    )
    assert model_card(preset("dsmoe-6b")).weight_bytes("bfloat16") / 2**30 == pytest.approx(
        12.6, abs=0.05
    )


MOA = model_card(VARIANTS["moa, gelu, mlp router"])


def test_active_with_all_experts_is_total() -> None:
    everything = MOA.total_without_embeddings
    assert MOA.active(DENSE) == MOA.active(top_k(16)) == everything
    assert MOA.active(THRESHOLD, 16, 2) == MOA.active(MEAN_TOP_K, 16) == everything
    assert MOA.active(MEAN_TOP_K, 4) == MOA.active(top_k(4)) == MOA.active(THRESHOLD, 4, 2)


def test_inactive_attention_expert_saves_queries_and_outputs() -> None:
    saved = MOA.active(THRESHOLD, 5.5, 2) - MOA.active(THRESHOLD, 5.5, 1)
    assert saved == 4 * (2 * 128 * 64)  # layers; two matrices of 128 by 2 heads of 32


def test_active_range() -> None:
    everything = MOA.total_without_embeddings
    assert MOA.active_range(top_k(4)) == (MOA.active(top_k(4)),) * 2
    assert MOA.active_range(THRESHOLD) == (MOA.active(THRESHOLD, 1, 1), everything)
    assert MOA.active_range(MEAN_TOP_K) == (MOA.active(MEAN_TOP_K, 1), everything)
    plain = model_card(preset("dense-tiny", inference_rule="threshold:0.48"))
    assert plain.active_range(THRESHOLD) == (plain.total_without_embeddings,) * 2


@pytest.mark.parametrize(
    ("rule", "means", "expected"),
    [
        (THRESHOLD, (None, 2), "depends on the text; give mean_mlp_experts, a measured value"),
        (THRESHOLD, (4, None), "mean_attention_experts, a measured value between 1 and 2"),
        (MEAN_TOP_K, (None, None), "give mean_mlp_experts"),
        (THRESHOLD, (0.5, 2), "mean_mlp_experts=0.5, but it must be between 1 and 16"),
        (THRESHOLD, (4, 3), "mean_attention_experts=3, but it must be between 1 and 2"),
        (top_k(4), (4, None), "leave mean_mlp_experts out"),
        (MEAN_TOP_K, (4, 2), "leave mean_attention_experts out"),
        (top_k(17), (None, None), "the most that works is top_k:16"),
    ],
)
def test_invalid_means_raise(
    rule: Rule, means: tuple[float | None, float | None], expected: str
) -> None:
    with pytest.raises(ConfigError) as error:
        MOA.active(rule, *means)
    assert expected in str(error.value)


@pytest.mark.parametrize("name", ["dense-tiny", "dsmoe-tiny", *VARIANTS])
def test_forward_flops_equal_torch_counter(name: str) -> None:
    config = VARIANTS[name] if name in VARIANTS else preset(name)
    config.inference_rule = "dense"
    config._attn_implementation = "eager"  # torch has no count for every sdpa kernel
    model = DsMoeForCausalLM(config).eval()
    length = 8
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, length, dtype=torch.long))
    # torch's attention multiplies the masked positions too, so every token attends to `length`.
    flops = model_card(config).forward_flops_per_token(DENSE, context=length)
    assert counter.get_total_flops() == flops * length


def test_flops_depend_on_rule() -> None:
    sparse = MOA.forward_flops_per_token(top_k(4), context=100)
    dense = MOA.forward_flops_per_token(DENSE, context=100)
    assert dense - sparse == 2 * (MOA.active(DENSE) - MOA.active(top_k(4)))
    longer = MOA.forward_flops_per_token(DENSE, context=101)
    assert longer - dense == 4 * 4 * 128  # scores and values; layers; query width
    half = MOA.forward_flops_per_token(
        THRESHOLD, context=101, mean_mlp_experts=16, mean_attention_experts=1
    )
    assert longer - half == 4 * 4 * 64 * 101 + 2 * (MOA.query_output // 2)


def test_training_flops() -> None:
    # A DS-MoE trains all experts, a sparse one those of its rule; causal context is half.
    ours, sparse = (model_card(preset(f"{kind}-tiny")) for kind in ("dsmoe", "smoe"))
    assert ours.training_flops_per_token(127) == 3 * ours.forward_flops_per_token(DENSE, context=64)
    assert sparse.training_flops_per_token(127) == 3 * sparse.forward_flops_per_token(
        top_k(4), context=64
    )
    by_text = model_card(preset("dsmoe-tiny", training_rule="threshold:0.48"))
    assert by_text.training_flops_per_token(127) == ours.training_flops_per_token(127)


def test_kv_bytes() -> None:
    card = model_card(preset("dsmoe-6b"))
    assert card.kv_bytes_per_token("bfloat16") == 2 * 36 * 4 * 128 * 2
    assert card.kv_bytes_per_token("float32") == 2 * card.kv_bytes_per_token("float16")
    sizes = {"num_hidden_layers": 3, "num_experts": 16}
    plain, early = (DsMoeConfig(**sizes, pregated=one) for one in (False, "previous_token"))
    more = 3 * 16 * 4  # router logits in float32
    for dtype in ("bfloat16", "float32"):
        kept = model_card(early).kv_bytes_per_token(dtype)
        assert kept == model_card(plain).kv_bytes_per_token(dtype) + more
        assert kept == kv_bytes_per_token(early, getattr(torch, dtype))


def test_unknown_dtype() -> None:
    with pytest.raises(ConfigError, match="'bf16' is not a known dtype; use float32, bfloat16"):
        MOA.weight_bytes("bf16")


@pytest.mark.parametrize("name", preset_names())
def test_json_and_table_agree(name: str) -> None:
    card = model_card(preset(name))
    record = json.loads(json.dumps(card.as_dict()))
    assert sum(record["parameters"].values()) == record["total"] == card.total
    rows = dict(card_rows(card))
    assert rows["total"].endswith("M")
    assert (rows["MLP routers"] == "none") == (card.num_experts == 1)
    assert (rows["head"] == "tied to the embeddings") == (record["parameters"]["head"] == 0)
    assert rows["active, dense"] == rows["total without embeddings"]
    assert f"active, {card.inference_rule}" in rows
    assert record["active"]["dense"] == [card.total_without_embeddings] * 2


def test_table_prints() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(card_table(model_card(preset("dsmoe-6b")), "dsmoe-6b"))
    text = console.export_text()
    assert "72.0 KiB a token" in text
    assert "by the text" in text
