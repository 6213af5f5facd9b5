"""Quantised checkpoints: tensors as each format stores them, and their values by the plain formula.

Every function takes a matrix W [R, C] in float32 and returns the tensors that stand in for it, by
the ending of their names, and the values that they stand for. Nothing of moefit is used.
"""

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

SINGLE = "model.safetensors"
Stored = tuple[dict[str, Tensor], Tensor]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def fp8_blocks(W: Tensor, block: int = 16, scales: torch.dtype = torch.float32) -> Stored:
    R, C = W.shape
    stored, values = torch.empty(R, C, dtype=torch.float8_e4m3fn), torch.empty(R, C)
    grid = torch.empty(ceil(R / block), ceil(C / block), dtype=scales)
    for i in range(0, R, block):
        for j in range(0, C, block):
            part = W[i : i + block, j : j + block]
            scale = (part.abs().max() / 448).to(scales)
            codes = (part / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
            grid[i // block, j // block] = scale
            stored[i : i + block, j : j + block] = codes
            values[i : i + block, j : j + block] = codes.float() * scale.float()
    return {"weight": stored, "weight_scale_inv": grid}, values


def fp8_tensor(W: Tensor) -> Stored:
    scale = W.abs().max() / 448
    codes = (W / scale).to(torch.float8_e4m3fn)
    more = {"weight_scale": scale, "input_scale": torch.tensor(0.5)}
    return {"weight": codes, **more}, codes.float() * scale


def fp8_channels(W: Tensor) -> Stored:
    scale = (W.abs().amax(1, keepdim=True) / 448).bfloat16()
    codes = (W / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale}, (codes.bfloat16() * scale).float()


def int8_channels(W: Tensor) -> Stored:
    scale = (W.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (W / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scale}, (codes.bfloat16() * scale).float()


def e2m1(x: Tensor) -> Tensor:
    """The codes of the nearest values."""
    return (x[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)


def mxfp4(W: Tensor) -> Stored:
    """gpt-oss's: blocks [R, C / 32, 16] and scales."""
    groups = W.view(len(W), -1, 32)
    exponents = (groups.abs().amax(-1).log2().floor() - 2).clamp(-127, 127)
    codes = e2m1(groups / exponents.exp2()[..., None])
    blocks = codes[..., 0::2] | codes[..., 1::2] << 4
    values = E2M1[codes.long()] * exponents.exp2()[..., None]
    return {"blocks": blocks, "scales": (exponents + 127).to(torch.uint8)}, values.view_as(W)


def nvfp4(W: Tensor, *, divides: bool = True) -> Stored:
    groups = W.view(len(W), -1, 16)
    whole = 448 * 6 / W.abs().max()
    scales = (groups.abs().amax(-1) / 6 * whole).to(torch.float8_e4m3fn)
    factor = whole.view(1) if divides else 1 / whole
    scale = scales.float() / factor if divides else scales.float() * factor
    codes = e2m1(groups / scale[..., None])
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).view(len(W), -1)
    values = (E2M1[codes.long()] * scale[..., None]).view_as(W)
    if divides:
        stored = {"weight_packed": packed, "weight_global_scale": factor}
        return {**stored, "weight_scale": scales}, values.bfloat16().float()
    stored = {"weight": packed, "weight_scale_2": factor, "weight_scale": scales}
    return {**stored, "input_scale": torch.tensor(0.5)}, values


def packed(codes: Tensor, bits: int = 4) -> Tensor:
    """int32 of consecutive codes in the last axis."""
    per_word = 32 // bits
    whole = F.pad(codes.long(), (0, -codes.shape[-1] % per_word)).unflatten(-1, (-1, per_word))
    words = (whole << bits * torch.arange(per_word)).sum(-1)
    return words.to(torch.int32)


def integers(W: Tensor, group: int, bits: int, of: Tensor | None = None) -> list[Tensor]:
    """Codes from 0, scales and zero points [R, G] of asymmetric groups; columns have groups."""
    of = torch.arange(W.shape[1]) // group if of is None else of
    count, most = int(of.max()) + 1, (1 << bits) - 1
    low = torch.stack([W[:, of == g].amin(1) for g in range(count)], 1).clamp(max=0)
    high = torch.stack([W[:, of == g].amax(1) for g in range(count)], 1).clamp(min=0)
    scale = ((high - low) / most).clamp(min=1e-4)
    zero = (-low / scale).round().clamp(1, most)
    codes = ((W / scale[:, of]).round() + zero[:, of]).clamp(0, most)
    return [codes.int(), scale, zero.int()]


def w4a16(
    W: Tensor, group: int = 32, bits: int = 4, scales: torch.dtype = torch.bfloat16
) -> Stored:
    """compressed-tensors, symmetric."""
    half = 1 << bits - 1
    groups = W.view(len(W), -1, group)
    scale = (groups.abs().amax(-1) / (half - 0.5)).to(scales)
    codes = (groups / scale.float()[..., None]).round().clamp(-half, half - 1)
    values = (codes.to(scales) * scale[..., None]).view_as(W).float()
    stored = {
        "weight_packed": packed((codes + half).view_as(W), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(W.shape),
    }
    return stored, values


def w4a16_asymmetric(W: Tensor, group: int = 32, of: Tensor | None = None) -> Stored:
    """compressed-tensors with zero points, and with `g_idx` if the groups of columns are given."""
    codes, scale, zero = integers(W, group, 4, of)
    scale = scale.bfloat16()
    columns = torch.arange(W.shape[1]) // group if of is None else of
    values = (codes.bfloat16() - zero[:, columns].bfloat16()) * scale[:, columns]
    stored = {
        "weight_packed": packed(codes),
        "weight_scale": scale,
        "weight_zero_point": packed(zero.T).T.contiguous(),
        "weight_shape": torch.tensor(W.shape),
    }
    return stored if of is None else {**stored, "weight_g_idx": of.int()}, values.float()


def gptq(W: Tensor, group: int = 32, bits: int = 4, of: Tensor | None = None, offset: int = 1):
    codes, scale, zero = integers(W, group, bits, of)
    columns = torch.arange(W.shape[1]) // group if of is None else of
    half = scale.half()
    values = (codes - zero[:, columns]).half() * half[:, columns]
    stored = {
        "qweight": packed(codes, bits).T.contiguous(),
        "qzeros": packed((zero - offset).T, bits),
        "scales": half.T.contiguous(),
        "g_idx": columns.int(),
    }
    return stored, values.float()


def awq(W: Tensor, group: int = 32) -> Stored:
    codes, scale, zero = integers(W, group, 4)
    columns = torch.arange(W.shape[1]) // group
    half = scale.half()

    def ordered(rows: Tensor) -> Tensor:
        return packed(rows.view(len(rows), -1, 8)[..., AWQ_ORDER].flatten(1))

    stored = {
        "qweight": ordered(codes.T.contiguous()),
        "qzeros": ordered(zero.T.contiguous()),
        "scales": half.T.contiguous(),
    }
    return stored, ((codes - zero[:, columns]).half() * half[:, columns]).float()


CT: dict[str, Any] = {"quant_method": "compressed-tensors"}


def _scheme(**weights: Any) -> dict[str, Any]:
    return {**CT, "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


KINDS: dict[str, tuple[Callable[[Tensor], Stored], dict[str, Any]]] = {
    "fp8-blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
    "fp8-tensor": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8-channels": (fp8_channels, _scheme(num_bits=8, type="float", strategy="channel")),
    "int8-channels": (int8_channels, _scheme(num_bits=8, type="int", strategy="channel")),
    "w4a16": (w4a16, _scheme(num_bits=4, type="int", group_size=32)),
    "w8a16": (lambda W: w4a16(W, bits=8), _scheme(num_bits=8, type="int", group_size=32)),
    "w4a16-asymmetric": (w4a16_asymmetric, _scheme(num_bits=4, type="int", symmetric=False)),
    "nvfp4": (nvfp4, _scheme(num_bits=4, type="float", group_size=16)),
    "nvfp4-modelopt": (lambda W: nvfp4(W, divides=False), {"quant_method": "modelopt"}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32}),
}
"""Of matrices stored one by one: how, and what config.json says."""


def quantise(
    plain: Path, folder: Path, store: Callable[[Tensor], Stored], config: dict[str, Any] | None
) -> Path:
    """Write a model folder with every projection quantised; `plain` then has the same values.

    Args:
        plain: A folder that `save_pretrained` wrote. Its weights are replaced.
        folder: Where to write the quantised model.
        store: A function of this module.
        config: Its quantization_config, if any.
    """
    tensors, quantised = load_file(plain / SINGLE), {}
    for name, tensor in list(tensors.items()):
        stem = name.removesuffix(".weight")
        chosen = "proj" in name or ".experts." in name
        if not chosen or "bias" in name or tensor.dim() < 2 or (stem != name and store is mxfp4):
            quantised[name] = tensor
        elif stem != name:
            stored, values = store(tensor.float())
            tensors[name] = values.to(tensor.dtype)
            quantised |= {f"{stem}.{part}": one.contiguous() for part, one in stored.items()}
        elif tensor.dim() == 3:  # gpt-oss's experts, stacked and transposed
            parts = [store(one.T.float().contiguous()) for one in tensor]
            tensors[name] = torch.stack([values.T for _, values in parts]).to(tensor.dtype)
            for part in parts[0][0]:
                quantised[f"{name}_{part}"] = torch.stack([stored[part] for stored, _ in parts])
    _write(plain, tensors, {})
    declared = {} if config is None else {"quantization_config": config}
    folder.mkdir()
    (folder / "config.json").write_text((plain / "config.json").read_text())
    return _write(folder, quantised, declared)


def _write(folder: Path, tensors: dict[str, Tensor], more: dict[str, Any]) -> Path:
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    return folder
