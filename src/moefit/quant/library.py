"""Find the compiled library of CPU kernels, declare its functions, and select its level.

Gives the library at the highest instruction set level that the processor has and MOEFIT_KERNELS
allows. Knows nothing of tensors.
"""

import ctypes
import os
from contextlib import suppress
from ctypes import POINTER, Structure, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Literal

import torch

Level = Literal["portable", "avx2", "avx2_vnni", "avx512", "avx512_bf16", "amx"]
LEVELS: tuple[Level, ...] = ("portable", "avx2", "avx2_vnni", "avx512", "avx512_bf16", "amx")
VERSION = 24  # of the C interface; equal to that in csrc/experts.cpp
SWITCH = "MOEFIT_KERNELS"  # environment variable: a level, or `torch` for none


class MatrixStruct(Structure):
    """`Matrix` of csrc/matrix.h."""

    _fields_ = (
        ("codes", c_void_p),
        ("meta", c_void_p),
        ("rows", c_int64),
        ("cols", c_int64),
        ("kind", c_int64),
    )


class ExpertStruct(Structure):
    """`Expert` of csrc/experts.cpp."""

    _fields_ = (
        ("w_in", MatrixStruct),
        ("w_out", MatrixStruct),
        ("first", c_int64),
        ("rows", c_int64),
        ("in_bias", c_void_p),
        ("out_bias", c_void_p),
        ("bias_kind", c_int64),
    )


@cache
def library() -> ctypes.CDLL | None:
    """Return the compiled library; None if there is none, or only one of other sources."""
    for path in sorted(Path(__file__).parent.glob("_kernels*.so")):
        with suppress(OSError):  # built for another system
            found = ctypes.CDLL(str(path))
            if _version(found) == VERSION:
                _declare_products(found)
                _declare_layers(found)
                found.moefit_use_mkl(_mkl_threads())
                return found
    return None


def _mkl_threads() -> int | None:
    """Return the address of MKL's function for the number of threads, if torch contains MKL."""
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    with suppress(OSError, AttributeError):
        return ctypes.cast(ctypes.CDLL(str(path)).MKL_Set_Num_Threads_Local, c_void_p).value
    return None


def _version(found: ctypes.CDLL) -> int:
    """Return the version of the library's interface; 0 for a library of old sources without one."""
    if not hasattr(found, "moefit_version"):
        return 0
    found.moefit_version.restype = c_int64
    return int(found.moefit_version())


@cache
def available_levels() -> tuple[Level, ...]:
    """Return the levels that this processor has; none if the kernels are not compiled."""
    compiled = library()
    found = int(compiled.moefit_levels()) if compiled else 0
    return tuple(level for number, level in enumerate(LEVELS) if found >> number & 1)


def level_note() -> str:
    """Return why the level in use is not that of MOEFIT_KERNELS; empty if it is, or for none.

    Answers differ between levels in their last bits, so another one is not used silently.
    """
    asked, found = os.environ.get(SWITCH), available_levels()
    if asked not in LEVELS or not found or asked in found:
        return ""
    used = [one for one in found if LEVELS.index(one) < LEVELS.index(asked)][-1]
    return (
        f"{SWITCH}={asked}, but this processor has {', '.join(found)} alone: {used} is used "
        f"instead; set {SWITCH}={used}, or unset it for {found[-1]}"
    )


def _declare_products(library: ctypes.CDLL) -> None:
    """Declare the functions of single products, codes and experts."""
    library.moefit_levels.restype = c_int64
    library.moefit_linear.argtypes = [
        c_int64, POINTER(MatrixStruct), c_void_p, c_int64, c_int64, c_void_p, c_void_p,
    ]  # fmt: skip
    library.moefit_decode.argtypes = [c_int64, POINTER(MatrixStruct), c_void_p, c_int64]
    library.moefit_fill.argtypes = [
        POINTER(MatrixStruct), c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p,
    ]  # fmt: skip
    library.moefit_encode.restype = c_int64
    library.moefit_encode.argtypes = [
        c_int64, POINTER(MatrixStruct), c_int64, c_int64, c_void_p, c_void_p, c_void_p,
    ]  # fmt: skip
    library.moefit_compensate.argtypes = [
        c_int64, POINTER(MatrixStruct), c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64,
        c_int64, c_void_p, c_void_p,
    ]  # fmt: skip
    library.moefit_experts.argtypes = [
        c_int64, POINTER(ExpertStruct), c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64,
        c_void_p, c_int64, c_int64, c_int64, c_void_p,
    ]  # fmt: skip
    library.moefit_token.argtypes = [
        c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int64,
        c_void_p, c_void_p,
    ]  # fmt: skip
    library.moefit_weighted_sum.argtypes = [
        c_int64, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_int64, c_int64,
        c_void_p, c_void_p,
    ]  # fmt: skip


def _declare_layers(library: ctypes.CDLL) -> None:
    """Declare attention, the small operations and whole layers."""
    library.moefit_attention.argtypes = [
        c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p,
    ]  # fmt: skip
    library.moefit_write_rows.argtypes = [c_int64, c_void_p]
    library.moefit_norm.argtypes = [c_int64, c_void_p, c_void_p, c_int64, c_void_p]
    library.moefit_route.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p]
    library.moefit_block.argtypes = [
        c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64, *[c_void_p] * 5,
    ]  # fmt: skip
    library.moefit_one_thread.argtypes = [c_int64]
    library.moefit_use_mkl.argtypes = [c_void_p]
    library.moefit_layers.restype = c_int64
    library.moefit_layers.argtypes = [
        c_int64, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64,
        *[c_void_p] * 4,
    ]  # fmt: skip
    library.moefit_resident_rows.argtypes = [
        c_int64, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p,
    ]  # fmt: skip
    library.moefit_router.argtypes = [
        c_int64, c_void_p, c_void_p, c_int64, c_int64, *[c_void_p] * 3,
    ]  # fmt: skip
    library.moefit_rotate.argtypes = [c_int64, *[c_void_p] * 7]
    library.moefit_elementwise.argtypes = [
        c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p,
    ]  # fmt: skip
    library.moefit_latent_queries.argtypes = [
        c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p,
    ]  # fmt: skip
    library.moefit_latent_values.argtypes = library.moefit_latent_queries.argtypes
    library.moefit_add_shared.argtypes = [
        c_int64, c_void_p, c_void_p, c_int64, c_int64, c_void_p,
    ]  # fmt: skip
