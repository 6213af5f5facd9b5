"""Experts in quantised and mixed slots, compared with decoded tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from levels import HERE, missing
from serving import differs_by, greedy, logits, serving
from tiny_served import parts_of, saved, tiny, tokens
from torch import Tensor

import moefit
from moefit.errors import CheckpointError, ConfigError
from moefit.moe.families import MoeBlock, TensorSpec
from moefit.moe.layouts import find_blocks
from moefit.moe.routing import Routing
from moefit.quant import cpu_kernels as kernels_module
from moefit.quant.format import FORMATS, Format, GroupedFormat
from moefit.quant.library import LEVELS, SWITCH
from moefit.serve.cache.eviction import LeastRecentlyUsed
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.io.loads import Transfer
from moefit.serve.layer import executor
from moefit.serve.layer.executor import ExpertInvoker
from moefit.serve.layer.expert_executor import fused_experts
from moefit.serve.stats import Counters
from tests.serve.test_encoder_decoder_serving import switch

torch.set_num_threads(1)
CPU = torch.device("cpu")
EXPERTS, WIDTH = 8, 72
MIXED = ("int4", "int8", "native", "int3")
SIZES = {"hidden_size": WIDTH, "intermediate_size": 40, "head_dim": 8}
# What activations of 15 bits, and of 8 bits for formats of up to 4, twice, and sums in float32
# leave of the largest output.
CLOSE, COARSE = 2.0**-12, 2.0**-5


@pytest.fixture(params=["best", "torch"])
def computing(request, monkeypatch):
    """Run with the best kernels here, with none and, if requested, on a GPU."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed (its wheel has 290 MB)")
        from moefit.quant.gpu.gpu_kernels import TritonKernels

        if torch.cuda.is_available():
            pytest.skip("Triton's interpreter is off where there is a GPU")
        monkeypatch.setattr(executor, "backend", lambda device: TritonKernels())
        yield request.param
        return
    if request.param == "best" and not HERE:
        pytest.skip(f"no kernels: {missing(LEVELS[0])}")
    monkeypatch.setenv(SWITCH, HERE[-1] if request.param == "best" else "torch")
    kernels_module.kernels.cache_clear()
    yield request.param
    kernels_module.kernels.cache_clear()


on_gpus_too = pytest.mark.parametrize("computing", ["best", "triton", "torch"], indirect=True)


@dataclass
class ModelStore:
    """An `ExpertStore` over a module's parameters for slots of any format."""

    block: MoeBlock
    module: Any

    def read(self, block: str, expert: int, into: Slot) -> None:
        with torch.inference_mode():
            native = parts_of(self.module, self.block, expert)
            into.format.encode(into.tensors, native, self.block.layout.specs)


def block_of(family: str, dtype: torch.dtype = torch.float32) -> tuple[MoeBlock, Any]:
    model = tiny(family, dtype=dtype, **SIZES)
    block = find_blocks(model)[0]
    return block, model.get_submodule(block.name)


@dataclass
class Bench:
    """An invoker with expert e in slot e, in the e-th format (or the last)."""

    block: MoeBlock
    invoke: ExpertInvoker
    slots: dict[int, Slot]

    def reference(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Reference in float64 over decoded tensors, by choice."""
        y_TD = torch.zeros(x_TD.shape, dtype=torch.float64)
        specs = self.block.layout.specs
        for expert, slot in self.slots.items():
            dense = slot.format.decode(slot.tensors, specs, torch.float32)
            y_each_TD = self.block.layout.output(
                {k: v.double() for k, v in dense.items()}, x_TD.double()
            )
            weight_T = (routing.weights_TK * (routing.ids_TK == expert)).sum(-1)
            y_TD += y_each_TD * weight_T[:, None]
        return y_TD


def bench(block: MoeBlock, module: Any, formats: Sequence[str], transfer: list[Transfer]) -> Bench:
    specs = block.layout.specs
    store = ModelStore(block, module)
    chosen = [FORMATS[formats[e % len(formats)]] for e in range(EXPERTS)]
    slots = {e: allocate_slot(format, specs, CPU) for e, format in enumerate(chosen)}
    residency = SlotTable(EXPERTS, EXPERTS, LeastRecentlyUsed())
    for e, slot in slots.items():
        assert residency.reserve(e) == e
        store.read(block.name, e, slot)
        residency.publish(e)
    transfer.append(Transfer(store))  # pyright: ignore[reportArgumentType]
    return Bench(block, ExpertInvoker(block, residency, slots, transfer[-1], Counters()), slots)


@pytest.fixture
def make():
    transfers: list[Transfer] = []
    yield lambda block, module, formats: bench(block, module, formats, transfers)
    for transfer in transfers:
        transfer.close()


def case(count: int, k: int, *, seed: int = 0, padding: float = 0, twice: bool = False):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(count, WIDTH, generator=generator)
    ids_TK = torch.rand(count, EXPERTS, generator=generator).argsort(-1)[:, :k]
    if twice and k > 1:
        ids_TK[:, 1] = ids_TK[:, 0]
    ids_TK[torch.rand(count, k, generator=generator) < padding] = EXPERTS
    return x_TD, Routing(ids_TK, torch.rand(count, k, generator=generator))


def assert_close(y_TD: Tensor, wanted_TD: Tensor, close: float = CLOSE) -> None:
    assert y_TD.shape == wanted_TD.shape
    if len(y_TD):
        assert differs_by(y_TD.double(), wanted_TD) <= close


@on_gpus_too
@pytest.mark.parametrize(
    ("formats", "close"),
    [(("int5", "int8", "int6"), CLOSE), (("int2", "int5"), COARSE), (MIXED, COARSE)],
)
@pytest.mark.parametrize("family", ["Mixtral", "GptOss", "DeepseekV3"])
def test_block_of_encoded_slots(make, computing, family: str, formats, close: float) -> None:
    """Token counts below and above the limit for decoding experts."""
    made = make(*block_of(family), formats)
    with torch.inference_mode():
        for count in (1, 5, 3 * 16):
            x_TD, routing = case(count, 3)
            assert_close(made.invoke(x_TD, routing), made.reference(x_TD, routing), close)


@cache
def mixed_mixtral() -> Bench:
    transfers: list[Transfer] = []
    made = bench(*block_of("Mixtral"), MIXED, transfers)
    transfers[0].close()  # all are resident
    return made


@settings(deadline=None, max_examples=40)
@given(
    count=st.sampled_from([0, 1, 2, 7, 30]),
    k=st.integers(1, EXPERTS),
    padding=st.sampled_from([0.0, 0.4, 1.0]),
    twice=st.booleans(),
    seed=st.integers(0, 99),
)
def test_padding_and_duplicates(count, k, padding, twice, seed: int) -> None:
    made = mixed_mixtral()
    x_TD, routing = case(count, k, seed=seed, padding=padding, twice=twice)
    with torch.inference_mode():
        y_TD = made.invoke(x_TD, routing)
        none_T = (routing.ids_TK == EXPERTS).all(-1)
        assert not y_TD[none_T].any()
        difference_TD = (y_TD.double() - made.reference(x_TD, routing)).abs()
    assert (difference_TD <= COARSE * 60).all()  # outputs are of the size of 60


@on_gpus_too
@pytest.mark.parametrize("over", [0, 1])
def test_expert_with_rows_around_kernel_limit(make, computing, over: int) -> None:
    made = make(*block_of("Mixtral"), MIXED)
    x_TD, _ = case(16 + over, 1)
    routing = Routing(
        torch.full((16 + over, 1), 1),
        torch.ones(16 + over, 1),
    )
    with torch.inference_mode():
        assert_close(made.invoke(x_TD, routing), made.reference(x_TD, routing))


@on_gpus_too
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_blocks(make, computing, dtype: torch.dtype) -> None:
    made = make(*block_of("Mixtral", dtype), MIXED)
    with torch.inference_mode():
        for count in (1, 6):
            x_TD, routing = case(count, 3)
            y_TD = made.invoke(x_TD.to(dtype), routing)
            assert y_TD.dtype == dtype
            wanted_TD = made.reference(x_TD.to(dtype).float(), routing)
            assert_close(y_TD, wanted_TD, COARSE)


def test_unsupported_experts_use_torch(make, computing) -> None:
    block, module = block_of("Mixtral", torch.float64)
    assert fused_experts(block.layout, CPU) is None
    made = make(block, module, MIXED)
    x_TD, routing = case(5, 3)
    with torch.inference_mode():
        y_TD = made.invoke(x_TD.double(), routing)
        assert_close(y_TD, made.reference(x_TD, routing), 1e-6)


@on_gpus_too
def test_nan_token_does_not_affect_others(make, computing) -> None:
    made = make(*block_of("Mixtral"), MIXED)
    x_TD, routing = case(6, 3)
    with torch.inference_mode():
        wanted_TD = made.invoke(x_TD, routing)
        x_TD[2] = torch.nan
        y_TD = made.invoke(x_TD, routing)
    assert y_TD[2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y_TD[rest], wanted_TD[rest])


# Whole models


@torch.no_grad()
def decoded_twin(model: Any, format: Format) -> Any:
    """Return the model with experts encoded and decoded."""
    for block in find_blocks(model):
        module, specs = model.get_submodule(block.name), block.layout.specs
        for expert in range(block.num_experts):
            native, slot = parts_of(module, block, expert), allocate_slot(format, specs, CPU)
            format.encode(slot.tensors, native, specs)
            for short, value in format.decode(slot.tensors, specs, torch.float32).items():
                native[short].copy_(value)
    return model


SHAPES = {
    "Mixtral": SIZES,
    "Olmoe": {"hidden_size": 64, "intermediate_size": 100, "norm_topk_prob": True},
    "GptOss": SIZES,
}


@pytest.mark.parametrize(
    ("family", "precision"), [("Mixtral", "int8"), ("Olmoe", "int5"), ("GptOss", "int5")]
)
def test_served_model_equals_decoded_model(
    tmp_path: Path, computing, family: str, precision: str
) -> None:
    folder = saved(tiny(family, **SHAPES[family]), tmp_path)
    twin = decoded_twin(tiny(family, **SHAPES[family]), FORMATS[precision])
    inputs = {"input_ids": tokens(2, 12)}
    with moefit.load(folder, precision=precision, context=128) as served:
        assert differs_by(logits(served.model, inputs), logits(twin, inputs)) < 2e-3
        steps = [greedy(model, inputs, tokens=3) for model in (served.model, twin)]
        assert differs_by(*steps) < 2e-3
        slots = [slot for experts in served.blocks.values() for slot in experts.slots.values()]
        assert len(slots) == EXPERTS * len(served.blocks)
        for slot in slots:
            assert slot.nbytes == FORMATS[precision].nbytes(slot.specs)
        assert served.report()["slot_bytes"] == sum(slot.nbytes for slot in slots)
        assert [one.slot_bytes for one in served.budget.blocks] == [
            FORMATS[precision].nbytes(experts.block.layout.specs)
            for experts in served.blocks.values()
        ]


def test_served_switch_transformers_equals_decoded_model(tmp_path: Path, computing) -> None:
    # Weights of a trained model's size; larger ones make much of any rounding, layer by layer.
    folder = saved(switch(initializer_factor=1.0), tmp_path)
    twin = decoded_twin(switch(initializer_factor=1.0), FORMATS["int8"])
    ids = torch.randint(3, 61, (2, 11), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
    with serving(folder, slots=5, precision="int8") as served:
        assert differs_by(logits(served.model, inputs), logits(twin, inputs)) < 2e-3


@pytest.mark.parametrize(
    "computing",
    ["best", "torch", pytest.param("triton", marks=pytest.mark.slow)],
    indirect=True,
)
@pytest.mark.parametrize(("family", "precision"), [("Mixtral", "int4"), ("GptOss", "int8")])
def test_residents_do_not_change_result_bitwise(
    tmp_path: Path, computing, family: str, precision: str
) -> None:
    folder = saved(tiny(family, **SHAPES[family]), tmp_path)
    inputs, made = {"input_ids": tokens(2, 12)}, []
    for slots in (2, EXPERTS):
        with serving(folder, slots=slots, precision=precision) as served:
            made.append(greedy(served.model, inputs, tokens=3))
    assert torch.equal(*made)


def test_unknown_precision_suggests_nearest(tmp_path: Path) -> None:
    folder = saved(tiny("Mixtral"), tmp_path)
    with pytest.raises(ConfigError, match=r"precision 'int7' does not exist.* nearest: int6"):
        moefit.load(folder, precision="int7")


def test_nan_expert_raises(tmp_path: Path) -> None:
    model = tiny("Mixtral", **SIZES)
    block = find_blocks(model)[1]
    with torch.no_grad():
        parts_of(model.get_submodule(block.name), block, 5)["down_proj"][7, 3] = torch.nan
    folder = saved(model, tmp_path)
    with (
        moefit.load(folder, precision="int4", context=128) as served,
        pytest.raises(
            CheckpointError,
            match=rf"expert 5 of {block.name}: down_proj: the weight of output 7",
        ),
    ):
        logits(served.model, {"input_ids": tokens(2, 40)})


def test_slot_specs_equal_block_specs() -> None:
    block, _ = block_of("GptOss")
    slot = allocate_slot(GroupedFormat(4), block.layout.specs, CPU)
    assert all(isinstance(spec, TensorSpec) for spec in slot.specs.values())
    assert slot.specs.keys() == slot.tensors.keys() == dict(block.layout.specs).keys()
