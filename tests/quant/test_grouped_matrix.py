import pytest
import torch

from moefit.quant.grouped_int import (
    GROUP,
    PLANES,
    ROWS_AT_ONCE,
    GroupedMatrix,
    bits_per_weight,
    codes_bytes,
    groups_of,
    meta_bytes,
    pack,
)

widths = pytest.mark.parametrize("bits", PLANES)


def random_matrix(rows: int, cols: int, bits: int) -> GroupedMatrix:
    generator = torch.Generator().manual_seed(rows + cols)
    made = GroupedMatrix.empty(rows, cols, bits)
    made.codes_RB.random_(generator=generator)
    made.meta_RMG.normal_(generator=generator)
    return made


@widths
@pytest.mark.parametrize("cols", [1, 63, 64, 65, 200])
def test_decoding_is_scale_times_code_plus_minimum(bits: int, cols: int) -> None:
    groups = groups_of(cols)
    generator = torch.Generator().manual_seed(0)
    code_RGI = torch.randint(2**bits, (3, groups, GROUP), generator=generator).to(torch.uint8)
    matrix = random_matrix(3, cols, bits)
    matrix.codes_RB.copy_(pack(code_RGI.view(-1, GROUP), bits).view(3, -1))
    dense_RC = matrix.dense(torch.float64)
    assert dense_RC.shape == (3, cols)
    for row in range(3):
        for col in range(cols):
            group, code = col // GROUP, int(code_RGI[row, col // GROUP, col % GROUP])
            scale = float(matrix.meta_RMG[row, 0, group])
            least = -128 * scale if bits == 8 else float(matrix.meta_RMG[row, 1, group])
            assert float(dense_RC[row, col]) == pytest.approx(scale * code + least, rel=1e-6)


@widths
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (1, 64), (5, 65), (3, 640)])
def test_bytes_match_size(bits: int, rows: int, cols: int) -> None:
    matrix = random_matrix(rows, cols, bits)
    assert matrix.codes_RB.nbytes == codes_bytes(rows, cols, bits)
    assert matrix.meta_RMG.nbytes == meta_bytes(rows, cols, bits)
    if cols % GROUP == 0:
        total = codes_bytes(rows, cols, bits) + meta_bytes(rows, cols, bits)
        assert total * 8 == bits_per_weight(bits) * rows * cols


@pytest.mark.parametrize("rows", [1, ROWS_AT_ONCE, ROWS_AT_ONCE + 1, 2 * ROWS_AT_ONCE + 7])
def test_parts_of_rows_are_views_that_decode_to_the_same(rows: int) -> None:
    matrix = random_matrix(rows, 70, 4)
    parts = list(matrix.split())
    assert torch.equal(torch.cat([part._dense() for part in parts]), matrix.dense())
    assert all(part.rows <= ROWS_AT_ONCE for part in parts)
    parts[-1].meta_RMG.zero_()
    assert not matrix.dense()[-1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_once(dtype: torch.dtype) -> None:
    matrix = random_matrix(300, 70, 5)
    assert torch.equal(matrix.dense(dtype), matrix.dense().to(dtype))


@widths
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 64, 70])
def test_slab_layout_is_as_documented(bits: int, rows: int) -> None:
    """Reference: word w of row r of a slab is word 16 w + r; remaining rows are unchanged."""
    matrix = random_matrix(rows, 130, bits)
    codes_RB, meta_RMG = matrix.by_row()
    whole, width = rows // 16 * 16, codes_RB.shape[1]
    for row in range(rows):
        for byte in range(width):
            place = row * width + byte
            if row < whole:
                word = byte // 4 * 16 + row % 16
                place = row // 16 * 16 * width + 4 * word + byte % 4
            assert codes_RB[row, byte] == matrix.codes_RB.flatten()[place]
        for number, group in ((n, g) for n in range(meta_RMG.shape[1]) for g in range(3)):
            place = (row * meta_RMG.shape[1] + number) * 3 + group
            if row < whole:
                place = row // 16 * 16 * meta_RMG.shape[1] * 3
                place += (group * meta_RMG.shape[1] + number) * 16 + row % 16
            assert meta_RMG[row, number, group] == matrix.meta_RMG.flatten()[place]
    back = GroupedMatrix.from_rows(bits, 130, codes_RB.clone(), meta_RMG.clone())
    assert torch.equal(back.codes_RB, matrix.codes_RB)
    assert torch.equal(back.meta_RMG, matrix.meta_RMG)


def test_row_selection_in_any_order() -> None:
    matrix = random_matrix(70, 130, 5)
    ids_T = torch.tensor([69, 0, 17, 17, 64, 3])
    assert torch.equal(matrix.take(ids_T).dense(), matrix.dense()[ids_T])
    assert matrix.take(ids_T[:0]).dense().shape == (0, 130)
