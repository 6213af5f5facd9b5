import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_served import FAMILIES, saved, tiny, tokens
from transformers import Qwen2MoeConfig

from moefit.cache_argument import returned_cache
from moefit.checkpoint.safetensors import SINGLE, Checkpoint
from moefit.errors import BudgetTooSmallError
from moefit.host import peak_process_bytes, process_bytes
from moefit.quant.cpu_kernels import kernels
from moefit.serve.config import LoadSettings
from moefit.serve.hf.quant_linear import quantizable_modules
from moefit.serve.hf.skeleton import build_skeleton
from moefit.serve.load import load_model
from moefit.serve.memory.activations import (
    FIRST_USE,
    KERNEL_FIRST_USE,
    kv_bytes_per_token,
    workspace_bytes,
)
from moefit.serve.memory.estimate import (
    RUN_TO_RUN,
    encoding_bytes,
    memory_budget,
    slot_bytes,
    weight_bytes,
)
from moefit.serve.memory.held import held_bytes, peak_held_bytes
from moefit.serve.memory.release import drop_library_pages
from moefit.serve.packed.store import PackedStore

MIB = 1 << 20


def cache_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_kv_estimate_equals_cache_after_generation(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype=dtype)
    ids_BT = tokens(3, 5)
    made = model.generate(
        ids_BT, max_new_tokens=7, min_new_tokens=7, do_sample=False, return_dict_in_generate=True
    )
    held = cache_bytes(returned_cache(made))
    # The last token is never put through the model; a sliding window holds less.
    estimate = 3 * (5 + 7 - 1) * kv_bytes_per_token(model.config, dtype)
    assert held <= estimate if family == "GptOss" else held == estimate


def test_kv_estimate_counts_repeated_layers() -> None:
    config = tiny("Mixtral").config
    once = kv_bytes_per_token(config, torch.bfloat16)
    config.total_num_hidden_layers = 5
    assert kv_bytes_per_token(config, torch.bfloat16) * config.num_hidden_layers == 5 * once


def test_workspace_includes_the_widest_shared_expert() -> None:
    narrow, wide = (
        Qwen2MoeConfig(
            intermediate_size=64, moe_intermediate_size=64, shared_expert_intermediate_size=width
        )
        for width in (64, 9064)
    )
    more = (workspace_bytes(one, 100, torch.bfloat16) for one in (wide, narrow))
    assert next(more) - next(more) == 3 * 9000 * 100 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_weights_exclude_experts(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = tiny(family)
    skeleton = build_skeleton(saved(model, tmp_path), dtype)
    expected = sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(block.name + ".") for block in skeleton.blocks)
    )
    assert weight_bytes(skeleton.map.dense_weights.values(), dtype) == expected


def test_integer_weights_keep_dtype(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(10, dtype=torch.int64), "b": torch.zeros(20)}, tmp_path / SINGLE)
    with Checkpoint(tmp_path) as checkpoint:
        assert weight_bytes(checkpoint.spans.values(), torch.bfloat16) == 80 + 40


def test_process_bytes_equal_resident_set() -> None:
    before = process_bytes()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    grown = process_bytes() - before
    assert abs(grown - held.nbytes) < 4 * MIB
    assert peak_process_bytes() >= process_bytes()
    del held
    assert abs(process_bytes() - before) < 4 * MIB
    assert peak_process_bytes() >= before + 60 * MIB


def test_gpu_budget_counts_reserved_memory(monkeypatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 1)
    assert abs(held_bytes(cpu) - process_bytes()) < 4 * MIB
    assert peak_held_bytes(cpu) == peak_process_bytes()
    monkeypatch.setattr(torch.cuda, "memory_reserved", {gpu: 5}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", {gpu: 7}.__getitem__)
    assert (held_bytes(gpu), peak_held_bytes(gpu)) == (5, 7)


@pytest.mark.parametrize(
    ("size", "on_gpu"),
    [(4096, 4096), (MIB, MIB), (12288, 12337), (9 * MIB, 10 * MIB), (10 * MIB, 10 * MIB),
     (11 * MIB, 12 * MIB), (12 * MIB, 12 * MIB), (12 * MIB + 4096, 14 * MIB),
     (336 * MIB, 336 * MIB)],
)  # fmt: skip
def test_gpu_slot_takes_share_of_segment(size: int, on_gpu: int) -> None:
    assert slot_bytes(size, torch.device("cuda")) == on_gpu
    assert slot_bytes(size, torch.device("cpu")) == size


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("size", [12288, 3 * MIB // 2, 9 * MIB, 12 * MIB, 13 * MIB + 4096])
def test_gpu_slots_match_estimate(size: int) -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    before = held_bytes(device)
    slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(100)]
    segment = 20 * MIB  # the last one may be begun only
    assert held_bytes(device) - before <= len(slots) * slot_bytes(size, device) + segment


FIRST_STEPS = """
import sys, torch
torch.set_num_threads(1)
from moefit.host import peak_process_bytes
from moefit.host import process_bytes
from moefit.serve.load import load_model as load
from moefit.serve.config import LoadSettings

served = load(sys.argv[1], LoadSettings(context=64, dtype=torch.bfloat16))
before = served.budget.process
ids = torch.arange(3, 35)[None]
with torch.inference_mode():
    served.model(ids)
    served.generate(ids, max_new_tokens=20, do_sample=False)
    served.generate(ids, max_new_tokens=20, do_sample=True)
served.check()
print(before, peak_process_bytes(), served.budget.all_resident_bytes)
"""


@pytest.mark.slow
def test_estimate_includes_first_use(tmp_path: Path) -> None:
    """A model of 250 kB, for which the first use of libraries dominates."""
    saved(tiny("Mixtral"), tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FIRST_STEPS, str(tmp_path)],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    process, peak, everything = (int(word) for word in done.stdout.split())
    assert peak <= everything
    assert peak - process <= (FIRST_USE if kernels() is None else KERNEL_FIRST_USE)
    if kernels() is None:  # torch's products then allocate far more
        assert peak - process > FIRST_USE // 8, "far less than what is reserved for it"


@pytest.mark.parametrize("precision", ["native", "int4-nearest"])
def test_kernels_reserve_nothing_for_decoding(precision: str, tmp_path: Path, monkeypatch) -> None:
    """gpt-oss's own matrices are torch's in any case: kernels need them the other way round."""
    settings = LoadSettings(context=64, precision=precision, dense_precision=precision)
    plain, biased = (
        build_skeleton(saved(tiny(family, hidden_size=64), tmp_path / family))
        for family in ("Mixtral", "GptOss")
    )
    specs = plain.blocks[0].layout.specs
    with_kernels = [memory_budget(one, settings) for one in (plain, biased)]
    for module in (
        "memory.estimate.kernels",
        "layer.expert_executor.backend",
        "hf.attention.kernels",
    ):
        monkeypatch.setattr(f"moefit.serve.{module}", lambda *_: None)
    by_torch = [memory_budget(one, settings) for one in (plain, biased)]
    if kernels() is not None:
        less = FIRST_USE - KERNEL_FIRST_USE
        assert by_torch[0].workspace - with_kernels[0].workspace == less
        decoded = settings.format(plain.blocks[0]).decoding_bytes(specs)
        assert by_torch[0].staging - with_kernels[0].staging >= decoded
    if kernels() is None or precision == "native":
        assert by_torch[1].workspace == with_kernels[1].workspace
    else:
        assert by_torch[1].workspace - with_kernels[1].workspace == less
    assert by_torch[1].staging >= with_kernels[1].staging


def test_encoding_counts_one_group_beside_the_encoded_weights(tmp_path: Path, monkeypatch) -> None:
    model = tiny("Mixtral", hidden_size=64, tie_word_embeddings=False)
    skeleton = build_skeleton(saved(model, tmp_path))
    settings = LoadSettings(context=64, dense_precision="int8")
    budget = memory_budget(skeleton, settings)
    sizes = [
        one.get_parameter("weight").numel() * 4
        for one in quantizable_modules(skeleton.model, skeleton.blocks).values()
    ]
    assert encoding_bytes(skeleton, settings, PackedStore({})) == budget.weights + sum(sizes)
    monkeypatch.setattr("moefit.serve.hf.dense_groups.GROUP_BYTES", 1)
    assert encoding_bytes(skeleton, settings, PackedStore({})) == budget.weights + max(sizes)


def test_least_budget_includes_what_encoding_takes(tmp_path: Path) -> None:
    drop_library_pages()  # those of all tests would be more than what encoding takes
    folder = saved(tiny("Mixtral", vocab_size=300_000, hidden_size=128), tmp_path)
    settings = LoadSettings(context=64, dense_precision="int4")
    least = memory_budget(build_skeleton(folder), settings).min_bytes
    load_model(folder, replace(settings, memory=least + RUN_TO_RUN)).close()
    with pytest.raises(BudgetTooSmallError, match="while they are being encoded"):
        load_model(folder, replace(settings, memory=least - RUN_TO_RUN))


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.parametrize(
    ("family", "attention"),
    [("Mixtral", "sdpa"), ("Olmoe", "sdpa"), ("DeepseekV3", "sdpa"), ("GptOss", "eager"),
     ("Mixtral", "eager")],
)  # fmt: skip
def test_long_prompt_stays_within_estimate(family: str, attention: str) -> None:
    """Measured on a narrow model whose activations are larger than its weights."""
    length = 1500
    model = tiny(family, num_hidden_layers=2, max_position_embeddings=4096,
                 attn_implementation=attention)  # fmt: skip
    try:
        reset_peak()
    except OSError:
        pytest.skip("this system does not reset peaks")
    assert model.config._attn_implementation == attention
    ids_BT = tokens(1, length)
    with torch.inference_mode():
        model(tokens(1, 3), use_cache=True)  # what only the first use touches
        reset_peak()
        before = process_bytes()
        made = model(ids_BT, use_cache=True, logits_to_keep=1)
    peak = peak_process_bytes() - before
    assert made.logits.shape[1] == 1
    cache = length * kv_bytes_per_token(model.config, torch.float32)
    work = workspace_bytes(model.config, length, torch.float32) - FIRST_USE
    assert peak <= cache + work + 6 * MIB


def test_estimate_includes_logits(tmp_path: Path) -> None:
    """Logits of a server's steps are large with a vocabulary of 150,000."""
    model = tiny("Olmoe", vocab_size=150_000, max_position_embeddings=64).bfloat16()
    skeleton = build_skeleton(saved(model, tmp_path))
    one = memory_budget(skeleton, LoadSettings(context=32))
    many = memory_budget(skeleton, LoadSettings(context=32, sequences=16, prompt_logits=16 << 20))
    prompts = 32 * 150_000 * 2
    assert many.workspace - one.workspace == 15 * 150_000 * (2 + 4) + prompts
    longer = LoadSettings(context=64, prompt_logits=16 << 20)
    assert (
        memory_budget(skeleton, longer).workspace
        - memory_budget(skeleton, LoadSettings(context=64)).workspace
        == 16 << 20
    )


def test_drafted_tokens_take_logits_and_no_kv_cache(tmp_path: Path) -> None:
    """A step verifies drafts of the same sequences, however many they are."""
    model = tiny("Olmoe", vocab_size=1000, max_position_embeddings=64).bfloat16()
    skeleton = build_skeleton(saved(model, tmp_path))
    plain = memory_budget(skeleton, LoadSettings(context=4096))
    drafting = memory_budget(skeleton, LoadSettings(context=4096, draft_rows=24))
    assert (drafting.context, drafting.kv_cache) == (plain.context, plain.kv_cache)
    assert plain.context == 64
    assert drafting.workspace - plain.workspace == 24 * 1000 * (2 + 4)
