"""The types of GGUF tensors: their numbers, names, and sizes of blocks.

A row of a tensor is a sequence of blocks, each of which holds some values in some bytes. The
numbers are those of llama.cpp's `ggml_type`, which never change.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class GgmlType:
    """A type of weights.

    Attributes:
        name: As llama.cpp prints it.
        values: Values in a block.
        nbytes: Bytes of a block.
        dtype: The dtype that has this type's values as they are; None for quantised types.
    """

    name: str
    values: int
    nbytes: int
    dtype: torch.dtype | None = None


TYPES = {
    number: GgmlType(name=name, values=values, nbytes=nbytes, dtype=dtype)
    for number, name, values, nbytes, dtype in (
        (0, "f32", 1, 4, torch.float32),
        (1, "f16", 1, 2, torch.float16),
        (2, "q4_0", 32, 18, None),
        (3, "q4_1", 32, 20, None),
        (6, "q5_0", 32, 22, None),
        (7, "q5_1", 32, 24, None),
        (8, "q8_0", 32, 34, None),
        (10, "q2_k", 256, 84, None),
        (11, "q3_k", 256, 110, None),
        (12, "q4_k", 256, 144, None),
        (13, "q5_k", 256, 176, None),
        (14, "q6_k", 256, 210, None),
        (16, "iq2_xxs", 256, 66, None),
        (17, "iq2_xs", 256, 74, None),
        (18, "iq3_xxs", 256, 98, None),
        (19, "iq1_s", 256, 50, None),
        (20, "iq4_nl", 32, 18, None),
        (21, "iq3_s", 256, 110, None),
        (22, "iq2_s", 256, 82, None),
        (23, "iq4_xs", 256, 136, None),
        (29, "iq1_m", 256, 56, None),
        (30, "bf16", 1, 2, torch.bfloat16),
        (34, "tq1_0", 256, 54, None),
        (35, "tq2_0", 256, 66, None),
        (39, "mxfp4", 32, 17, None),
    )
}
"""By number. Types of activations and of integers, which no model's weights have, are left out."""
BY_NAME = {one.name: one for one in TYPES.values()}
