"""Recording block inputs on a calibration text."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_served import saved, tiny, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM, SwitchTransformersForConditionalGeneration
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
)

from moefit.errors import BudgetTooSmallError, CheckpointError
from moefit.serve.config import LoadSettings
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.memory.estimate import memory_budget
from moefit.serve.packed import calibrate as module
from moefit.serve.packed.calibrate import (
    MAX_OTHER_TOKENS,
    OTHER_TOKENS_WEIGHT,
    BlockInputs,
    CalibrationText,
    record_block_inputs,
)
from moefit.serve.windows import Windows, padded
from tests.serve.test_encoder_decoder_serving import switch_config


def calibration(windows: int | Windows = 3, length: int = 16, **changes: Any) -> CalibrationText:
    facts: dict[str, Any] = {"text": "a text", "digest": "one"}
    if isinstance(windows, int):
        windows = Windows(tokens(windows, length + 1))
    return CalibrationText(windows=windows, **(facts | changes))


def own_inputs(folder: Path, ids_BT: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return tokens and weights by expert and block, from transformers' model."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found: list[tuple[Tensor, Tensor]] = []

    def record(experts: Any, arguments: tuple[Tensor, ...]) -> None:
        x_TD, ids_TK, weights_TK = (one.flatten(0, -2) for one in arguments)
        weight_TE = torch.zeros(len(x_TD), 8).scatter_add(1, ids_TK, weights_TK)
        found.append((x_TD.detach(), weight_TE.detach()))

    for name, part in model.named_modules():
        if name.endswith(".experts"):
            part.register_forward_pre_hook(record)
    with torch.no_grad():
        for window_T in ids_BT:
            model(window_T[None])
    blocks = len(found) // len(ids_BT)
    return [
        (torch.cat([x for x, _ in found[b::blocks]]), torch.cat([w for _, w in found[b::blocks]]))
        for b in range(blocks)
    ]


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_recorded_inputs_equal_transformers(tmp_path: Path, family: str) -> None:
    folder = saved(tiny(family), tmp_path / "model")
    what = calibration()
    reported: list[tuple[int, int]] = []
    kept = record_block_inputs(
        build_skeleton(folder), what, tmp_path / "kept", lambda *done: reported.append(done)
    )
    for index, (x_TD, weight_TE) in enumerate(own_inputs(folder, what.windows.ids_BT[:, :-1])):
        block = kept.block(index)
        assert block is not None
        assert torch.allclose(block.x_TD, x_TD, atol=1e-4)
        assert torch.allclose(block.weight_TE, weight_TE, atol=1e-4)
    assert reported == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_recording_does_not_depend_on_the_budget(folder: Path, tmp_path: Path) -> None:
    """With one slot per block, experts are swapped while the text is processed."""
    skeleton = build_skeleton(folder)
    with pytest.raises(BudgetTooSmallError, match="at least"):
        record_block_inputs(skeleton, calibration(memory=1 << 20), tmp_path / "none")
    budget = memory_budget(build_skeleton(folder), LoadSettings(context=16))
    least = budget.total_for_slots([1] * len(budget.blocks)) + (
        64 << 20
    )  # for growth of the process
    small = record_block_inputs(
        build_skeleton(folder), calibration(memory=least), tmp_path / "small"
    )
    large = record_block_inputs(build_skeleton(folder), calibration(), tmp_path / "large")
    for index in range(2):
        one, other = small.block(index), large.block(index)
        assert one is not None and other is not None
        assert torch.equal(one.x_TD, other.x_TD)


def test_recording_of_the_same_text_is_reused(
    folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    record_block_inputs(build_skeleton(folder), calibration(), tmp_path / "kept")
    with monkeypatch.context() as patched:
        patched.setattr(module, "load_model", lambda *_: pytest.fail("read again"))
        assert (
            record_block_inputs(build_skeleton(folder), calibration(), tmp_path / "kept").block(0)
            is not None
        )
    other = record_block_inputs(
        build_skeleton(folder), calibration(windows=5, digest="two"), tmp_path / "kept"
    ).block(0)
    assert other is not None and len(other.x_TD) == 5 * 16


def test_interrupted_recording_is_discarded(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    kept = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        record_block_inputs(build_skeleton(folder), calibration(), kept, interrupt)
    assert any(kept.iterdir())
    block = record_block_inputs(build_skeleton(folder), calibration(), kept).block(0)
    assert block is not None and len(block.x_TD) == 3 * 16
    (kept / "calibration.json").write_text(json.dumps({"digest": "one"})[:-3])  # a torn file
    assert record_block_inputs(build_skeleton(folder), calibration(), kept).block(1) is not None


def test_inputs_that_are_not_finite_raise(tmp_path: Path) -> None:
    model = tiny("Mixtral")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = torch.inf
    folder = saved(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"layers.1.*not finite.*in torch.float32"):
        record_block_inputs(build_skeleton(folder), calibration(), tmp_path / "kept")


def test_full_disk_raises(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=5 << 10))
    with pytest.raises(CheckpointError, match=r"takes 1\d.* KiB in .* but only 5.00 KiB are free"):
        record_block_inputs(build_skeleton(folder), calibration(), tmp_path / "kept")


def test_pairs_are_recorded_in_encoder_and_decoder(tmp_path: Path) -> None:
    """Each pair is read once, without padding, by the side that it is for."""
    model = SwitchTransformersForConditionalGeneration(switch_config()).eval()
    folder = saved(model, tmp_path / "switch")
    sources, targets = [tokens(1, n)[0] for n in (5, 9)], [tokens(1, n)[0] for n in (8, 3)]
    windows = Windows(padded(targets), padded(sources))
    kept = record_block_inputs(
        build_skeleton(folder), calibration(windows=windows), tmp_path / "kept"
    )
    seen: dict[str, list[Tensor]] = {}
    for name, part in model.named_modules():
        if isinstance(part, SwitchTransformersExperts):
            hook = lambda _, given, name=name: seen.setdefault(name, []).append(given[0])  # noqa: E731
            part.register_forward_pre_hook(hook)
    with torch.no_grad():
        for source_S, target_T in zip(sources, targets, strict=True):
            model(input_ids=source_S[None], decoder_input_ids=target_T[None, :-1])
    assert len(seen) == 4
    for index, (name, inputs_) in enumerate(seen.items()):
        block = kept.block(index)
        assert block is not None
        assert len(block.x_TD) == (5 + 9 if name.startswith("encoder") else 7 + 2)
        assert torch.allclose(block.x_TD, torch.cat(inputs_), atol=1e-4)
        assert (block.weight_TE > 0).sum(-1).tolist() == [1] * len(block.x_TD)


def inputs(weights: list[list[float]]) -> BlockInputs:
    weight_TE = torch.tensor(weights)
    return BlockInputs(torch.arange(float(len(weights)))[:, None], weight_TE)


def test_rows_begin_with_the_experts_own_tokens() -> None:
    x_ND, count_N = inputs([[0.5, 0], [1.0, 0], [0, 1], [0, 1], [0, 1]]).rows(0)
    assert x_ND[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert count_N[:2].tolist() == [0.25, 1.0]
    each = 0.625 * OTHER_TOKENS_WEIGHT / 3
    assert count_N[2:].tolist() == pytest.approx([each] * 3)


def test_rows_of_an_unused_expert_are_other_tokens() -> None:
    x_ND, count_N = inputs([[1.0, 0], [1.0, 0], [1.0, 0]]).rows(1)
    assert x_ND[:, 0].tolist() == [0, 1, 2]
    assert count_N.tolist() == pytest.approx([OTHER_TOKENS_WEIGHT / 3] * 3)


def test_expert_used_by_all_tokens_has_no_other_rows() -> None:
    x_ND, count_N = inputs([[1.0, 0], [2.0, 0]]).rows(0)
    assert (x_ND[:, 0].tolist(), count_N.tolist()) == ([0, 1], [1.0, 4.0])


def test_other_rows_are_limited_and_evenly_spaced() -> None:
    weight_TE = torch.zeros(10_000, 2)
    weight_TE[:, 0] = 1
    x_ND, count_N = BlockInputs(torch.arange(10_000.0)[:, None], weight_TE).rows(1)
    assert len(x_ND) == MAX_OTHER_TOKENS
    assert (int(x_ND[0]), int(x_ND[-1])) == (0, 9999)
    assert float(count_N.sum()) == pytest.approx(OTHER_TOKENS_WEIGHT)


@pytest.mark.parametrize("name", ["inputs-000", "weights-001", "calibration.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b'{"digest": "one", "blocks": 3}', b"\0" * 64])
def test_damaged_recording_is_replaced(
    folder: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    kept = tmp_path / "kept"
    before = record_block_inputs(build_skeleton(folder), calibration(), kept).block(0)
    assert before is not None
    expected = before.x_TD.clone()
    (kept / name).write_bytes(content)
    after = record_block_inputs(build_skeleton(folder), calibration(), kept).block(0)
    assert after is not None
    assert torch.equal(after.x_TD, expected)
