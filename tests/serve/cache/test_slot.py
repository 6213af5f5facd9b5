import gc
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_served import mixtral_block, parts_of

from moefit.checkpoint.safetensors import bytes_of
from moefit.host import process_bytes
from moefit.moe.families import TensorSpec
from moefit.quant.format import NativeFormat, expert_output
from moefit.serve.cache.slot import Slot, allocate_slot

CPU = torch.device("cpu")
specs = st.dictionaries(
    st.text("abc_", min_size=1),
    st.builds(
        TensorSpec,
        st.lists(st.integers(1, 9), max_size=3).map(tuple),
        st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]),
    ),
    min_size=1,
    max_size=5,
)


def range_of(tensor: torch.Tensor) -> range:
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


@settings(deadline=None)
@given(specs)
def test_tensors_are_aligned_within_slot(specs) -> None:
    slot = allocate_slot(NativeFormat(), specs, CPU)
    assert {k: (tuple(t.shape), t.dtype) for k, t in slot.tensors.items()} == {
        k: (spec.shape, spec.dtype) for k, spec in specs.items()
    }
    parts = sorted((range_of(t) for t in slot.tensors.values()), key=lambda part: part.start)
    assert all(part.start % 64 == 0 for part in parts)
    assert all(a.stop <= b.start for a, b in pairwise(parts))
    assert parts[-1].stop - parts[0].start <= slot.nbytes == NativeFormat().nbytes(specs)
    for number, tensor in enumerate(slot.tensors.values()):
        bytes_of(tensor)[:] = bytes([number + 1]) * tensor.nbytes
    for number, tensor in enumerate(slot.tensors.values()):
        assert bytes(bytes_of(tensor)) == bytes([number + 1]) * tensor.nbytes


@settings(deadline=None)
@given(specs)
def test_slot_bytes_equal_allocated_memory(specs) -> None:
    page = 4096
    assert NativeFormat().nbytes(specs) % page == 0
    assert NativeFormat().nbytes(specs) < sum(s.nbytes + 63 for s in specs.values()) + page


def big_slot(mib: int) -> Slot:
    return allocate_slot(NativeFormat(), {"w": TensorSpec((mib << 20,), torch.uint8)}, CPU)


@pytest.mark.parametrize("mib", [1, 3, 8])
def test_dropped_slots_are_returned_to_system(mib: int) -> None:
    gc.collect()
    before, noise = process_bytes(), 4 << 20
    slots = [big_slot(mib) for _ in range(64 // mib)]
    size = sum(slot.nbytes for slot in slots)
    assert process_bytes() - before < noise, "memory is taken when it is written to"
    for slot in slots:
        slot.tensors["w"].fill_(1)
    assert abs(process_bytes() - before - size) < noise
    del slots[::2], slot
    assert abs(process_bytes() - before - sum(slot.nbytes for slot in slots)) < noise
    slots.clear()
    assert abs(process_bytes() - before) < noise


def test_view_keeps_slot_memory() -> None:
    view = big_slot(1).tensors["w"][5:9]
    view.fill_(7)
    gc.collect()
    assert view.tolist() == [7, 7, 7, 7]


def test_slot_is_private_memory() -> None:
    """Shared mappings would not get huge pages, and forked children would write into them."""
    slot = big_slot(8)
    address = slot.tensors["w"].data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            assert line.split()[1] == "rw-p"
            return
    raise AssertionError("no mapping has the slot's address")


def test_format_output_equals_family() -> None:
    block, module = mixtral_block()
    slot = allocate_slot(NativeFormat(), block.layout.specs, CPU)
    for short, value in parts_of(module, block, 2).items():
        slot.tensors[short].copy_(value)
    x_RD = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ids_T1, weights_T1 = torch.full((5, 1), 2), torch.ones(5, 1)
        expected = module(x_RD, ids_T1, weights_T1)
    y_RD = expert_output(block.layout, slot.format, slot.tensors, x_RD)
    torch.testing.assert_close(y_RD, expected)


def test_bytes_view_needs_contiguous_memory() -> None:
    with pytest.raises(AssertionError):
        bytes_of(torch.zeros(4, 4).T)
    value = torch.zeros(3, dtype=torch.bfloat16)
    bytes_of(value)[:2] = b"\x80\x3f"
    assert value.tolist() == [1.0, 0.0, 0.0]
