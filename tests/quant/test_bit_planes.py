import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefit.quant.grouped_int import GROUP, PLANES, pack, unpack

widths = pytest.mark.parametrize("bits", PLANES)


def codes(groups: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (groups, GROUP), dtype=torch.uint8, generator=generator)


@settings(deadline=None)
@given(st.sampled_from(sorted(PLANES)), st.integers(0, 9), st.integers(0, 2**31))
def test_unpacking_is_the_inverse_of_packing(bits: int, groups: int, seed: int) -> None:
    codes_NG = codes(groups, bits, seed)
    bytes_NB = pack(codes_NG, bits)
    assert bytes_NB.dtype == torch.uint8 and bytes_NB.shape == (groups, bits * 8)
    assert torch.equal(unpack(bytes_NB, bits), codes_NG)


@settings(deadline=None)
@given(st.sampled_from(sorted(PLANES)), st.integers(0, 2**31))
def test_all_bytes_are_valid_codes(bits: int, seed: int) -> None:
    """Groups have no unused bits, and arbitrary bytes decode."""
    generator = torch.Generator().manual_seed(seed)
    bytes_NB = torch.randint(256, (3, bits * 8), dtype=torch.uint8, generator=generator)
    assert torch.equal(pack(unpack(bytes_NB, bits), bits), bytes_NB)


@widths
def test_the_layout_is_as_documented(bits: int) -> None:
    """Reference: bit by bit, in Python integers."""
    (codes_G,) = codes(1, bits, seed=bits).tolist()
    expected, below = [0] * (bits * 8), 0
    start = 0
    for width in PLANES[bits]:
        stride = GROUP * width // 8  # of weights that share no byte
        for i, code in enumerate(codes_G):
            field = code >> below & (1 << width) - 1
            byte, shift = i % stride, i // stride * width
            expected[start + byte] |= field << shift
        start, below = start + stride, below + width
    assert pack(torch.tensor([codes_G], dtype=torch.uint8), bits).tolist() == [expected]
