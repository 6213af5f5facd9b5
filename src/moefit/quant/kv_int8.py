"""Keys and values of a cache rounded to int8, with a scale per token and head.

`Int8Rows` holds rounded rows with their scales, and `write_rows` rounds new rows into it: with the
compiled kernel, or with `quantize_rows` in torch, which gives the same bits. A row is rounded once,
when it is written, and by itself, so the cache does not depend on how a prompt is divided or on
other requests.

Shapes: G KV heads, P places of a cache (one token each), R new tokens, C head width.
"""

from collections.abc import Callable
from ctypes import Structure, byref, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from moefit.graphs import outside_of_graphs
from moefit.quant.cpu_kernels import NATIVE_DTYPES, Kernels, kernels

MODEL_CACHE, INT8_CACHE = "model", "int8"
KV_CACHES = (MODEL_CACHE, INT8_CACHE)
"""What a KV cache may hold: values in the model's dtype, or `Int8Rows`."""
LARGEST_CODE = 127
_SMALLEST = 1e-30  # largest value of a row below which the row is zero: SMALLEST of csrc/matrix.h
_LANES = 16  # the kernel rounds rows whose width is a multiple of it
SCALE_BYTES = 4


class Int8Rows(Tensor):
    """Codes of rows, int8 [..., P, C], with the scale of each row: a row is codes * scale.

    Models pass it from the cache to attention unchanged. A tensor derived from it is a plain tensor
    of codes without scales, which attention refuses.

    Attributes:
        scales: Scales, float32 [..., P].
    """

    scales: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor) -> "Int8Rows":
        """Return codes with their scales."""
        assert codes.dtype == torch.int8 and codes.shape[:-1] == scales.shape
        rows = codes.as_subclass(cls)
        rows.scales = scales
        return rows

    @classmethod
    def zeros(cls, *shape: int) -> "Int8Rows":
        """Return rows of zeros, [*shape]."""
        return cls.of(torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[:-1]))

    def codes(self) -> Tensor:
        """Return the codes as a plain tensor."""
        return self.as_subclass(Tensor)

    def part(self, *index: Any) -> "Int8Rows":
        """Return rows by an index over the dimensions that codes and scales share."""
        return Int8Rows.of(self.codes()[index], self.scales[index])

    def changed(self, change: Callable[[Tensor], Tensor]) -> "Int8Rows":
        """Return rows after a change of the dimensions that codes and scales share."""
        return Int8Rows.of(change(self.codes()), change(self.scales))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the rows' values [..., P, C]."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.codes().to(wide) * self.scales[..., None].to(wide)).to(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Rows":
        return Int8Rows.of(self.codes().clone(), self.scales.clone())


def part_of(cache: Tensor, *index: Any) -> Tensor:
    """Return a part of cached keys or values; of `Int8Rows` with its scales."""
    return cache.part(*index) if isinstance(cache, Int8Rows) else cache[index]


def floats_of(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """Return cached keys or values in `dtype`."""
    return cache.dequantized(dtype) if isinstance(cache, Int8Rows) else cache.to(dtype)


def bytes_per_row(width: int) -> int:
    """Return the bytes of a row of `width` values with its scale.

    >>> bytes_per_row(128)
    132
    """
    return width + SCALE_BYTES


def quantize_rows(rows: Tensor) -> Int8Rows:
    """Round each row to the nearest multiples of its largest absolute value / 127, in torch.

    A row that contains infinity or NaN gets the scale NaN, so that it does not go unnoticed.

    Args:
        rows: Rows [..., C].
    """
    values = rows.float()
    largest = values.abs().amax(-1)
    finite = largest.isfinite()
    usable = finite & (largest >= _SMALLEST)
    # `127 / largest` would be the reciprocal times 127, which rounds twice
    inverse = torch.where(usable, torch.full_like(largest, LARGEST_CODE) / largest, 0.0)
    codes = torch.where(usable[..., None], (values * inverse[..., None]).round(), 0.0)
    scales = torch.where(usable, largest / LARGEST_CODE, 0.0).masked_fill(~finite, torch.nan)
    return Int8Rows.of(codes.to(torch.int8), scales)


class _CacheRows(Structure):
    _fields_ = (
        ("rows", c_void_p),
        *((name, c_int64) for name in ("heads", "tokens", "width", "kind")),
        *((name, c_int64) for name in ("row_head", "row_token")),
        ("places", c_void_p),
        ("codes", c_void_p),
        *((name, c_int64) for name in ("code_head", "code_token")),
        ("scales", c_void_p),
        ("scale_head", c_int64),
    )


@outside_of_graphs
def write_rows(target_GPC: Int8Rows, places_R: Tensor, rows_GRC: Tensor) -> None:
    """Round rows and write them to a cache.

    Args:
        target_GPC: The cache of one layer's keys or values.
        places_R: Where each token's rows belong, int64.
        rows_GRC: New keys or values.
    """
    compiled = kernels()
    if compiled is not None and _kernel_fits(target_GPC, rows_GRC):
        _write_by_kernel(compiled, target_GPC, places_R, rows_GRC)
        return
    rounded = quantize_rows(rows_GRC)
    target_GPC.codes().index_copy_(1, places_R, rounded.codes())
    target_GPC.scales.index_copy_(1, places_R, rounded.scales)


def _kernel_fits(target_GPC: Int8Rows, rows_GRC: Tensor) -> bool:
    return (
        rows_GRC.dtype in NATIVE_DTYPES
        and rows_GRC.shape[-1] % _LANES == 0
        and rows_GRC.stride(-1) == target_GPC.stride(-1) == target_GPC.scales.stride(-1) == 1
    )


def _write_by_kernel(
    compiled: Kernels, target_GPC: Int8Rows, places_R: Tensor, rows_GRC: Tensor
) -> None:
    heads, tokens, width = rows_GRC.shape
    assert target_GPC.shape[0] == heads and target_GPC.shape[2] == width
    places_R = places_R.contiguous()
    assert places_R.dtype == torch.int64 and len(places_R) == tokens
    struct = _CacheRows(
        rows_GRC.data_ptr(), heads, tokens, width, NATIVE_DTYPES[rows_GRC.dtype],
        *rows_GRC.stride()[:2], places_R.data_ptr(),
        target_GPC.data_ptr(), *target_GPC.stride()[:2],
        target_GPC.scales.data_ptr(), target_GPC.scales.stride(0),
    )  # fmt: skip
    compiled.write_rows(byref(struct))
