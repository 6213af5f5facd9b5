"""Small integers in bit planes, 64 to a group: what the kernels read, said in tensors.

Owns the order of bits. A code of 3 bits is a plane of 2 and one of 1, of 5 bits 4 and 1, of 6 bits
4 and 2, low bits first; so every width takes exactly bits * 8 bytes a group. Within a plane of
w bits, byte i holds weight i in its lowest bits, and weights i + 8w, i + 16w, ... in the next ones:
taking a plane apart is shifting it as a whole.

Shapes: N groups, 64 weights each.
"""

import torch
from torch import Tensor

GROUP = 64
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def pack(codes_NG: Tensor, bits: int) -> Tensor:
    """Codes [N, 64], uint8, as [N, bits * 8] bytes."""
    planes, below = [], 0
    for width in PLANES[bits]:
        field_NG = (codes_NG >> below) & ((1 << width) - 1)
        planes.append(_pack_fields(field_NG, width))
        below += width
    return torch.cat(planes, dim=1)


def unpack(bytes_NB: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    codes_NG = bytes_NB.new_zeros(len(bytes_NB), GROUP)
    start, below = 0, 0
    for width in PLANES[bits]:
        plane_NB = bytes_NB[:, start : start + width * 8]
        field_NG = _unpack_fields(plane_NB, width)
        codes_NG |= field_NG << below
        start, below = start + width * 8, below + width
    return codes_NG


def _pack_fields(field_NG: Tensor, width: int) -> Tensor:
    shares = field_NG.view(len(field_NG), 8 // width, width * 8).unbind(1)
    packed_NB = torch.zeros_like(shares[0])
    for place, share_NB in enumerate(shares):
        packed_NB |= share_NB << place * width
    return packed_NB


def _unpack_fields(plane_NB: Tensor, width: int) -> Tensor:
    shifts = range(0, 8, width)
    return torch.cat([(plane_NB >> shift) & ((1 << width) - 1) for shift in shifts], dim=1)
