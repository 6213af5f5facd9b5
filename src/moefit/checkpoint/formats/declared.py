"""What a model's configuration files say about its quantisation.

The tensors decide what a weight is; the declaration supplies what they do not show, such as the
size of blocks. It is at the top level of config.json, in a nested configuration, or in modelopt's
hf_quant_config.json.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefit.checkpoint.model_folder import read_json_or_empty

_DEPTH = 3  # nesting of configurations: a thinker's text_config is the third level
_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """A declaration of quantised weights.

    Attributes:
        where: The file and key.
        method: Such as `fp8` or `compressed-tensors`, in lower case.
        values: The declaration itself. It comes with the checkpoint: any key may have any value.
    """

    where: str
    method: str
    values: Mapping[str, Any]

    def number(self, *names: str) -> int | None:
        """Return the first of these values that is a positive whole number."""
        return _number(self.values, *names)

    def block(self) -> tuple[int, int] | None:
        """Return the rows and columns of a block of FP8, if they are given."""
        found = self.values.get("weight_block_size")
        if found is None and self.method == "compressed-tensors":
            blocks = (weights.get("block_structure") for weights, _ in self._groups())
            found = next((one for one in blocks if one), None)
        match found:
            case [int(rows), int(cols)] if rows > 0 and cols > 0:
                return rows, cols
        return None

    def bits(self, module: str) -> int | None:
        """Return the bits of a module's integers.

        compressed-tensors has a list of groups, each with the modules that it is for: regular
        expressions after `re:`, names, or classes such as `Linear`, which come last here.
        """
        if self.method != "compressed-tensors":
            return self.number("bits", "w_bit")
        fallback = None
        for weights, targets in self._groups():
            bits = _number(weights, "num_bits")
            for target in targets:
                if _matches(target, module):
                    return bits
            fallback = fallback or bits
        return fallback

    def widths(self) -> set[int]:
        """Return the numbers of bits of all integers."""
        schemes = [self.values]
        if self.method == "compressed-tensors":
            schemes = [weights for weights, _ in self._groups()]
        found = (_number(one, "bits", "w_bit", "num_bits") for one in schemes)
        return {bits for bits in found if bits is not None}

    def _groups(self) -> Iterator[tuple[Mapping[str, Any], list[str]]]:
        """Yield the scheme of weights, and the targets, of each group of compressed-tensors."""
        groups = self.values.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping):
                targets = group.get("targets")
                yield (
                    group["weights"],
                    [str(t) for t in targets] if isinstance(targets, list) else [],
                )


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target.removeprefix("re:"), module) is not None
        except re.error:
            return False
    return module == target or module.endswith(f".{target}")


def _number(values: Mapping[str, Any], *names: str) -> int | None:
    found = (values.get(name) for name in names)
    return next((one for one in found if type(one) is int and one > 0), None)


def declared(folder: Path) -> Declared | None:
    """Return what a folder's files declare, if anything. Damaged files are ignored here."""
    for where, found in _quantisations(read_json_or_empty(folder / "config.json"), ""):
        names = (found.get(key) for key in ("quant_method", "quant_algo", "format"))
        method = str(next(filter(None, names), "unknown method"))
        return Declared(where=f"config.json ({where})", method=method.lower(), values=found)
    modelopt = read_json_or_empty(folder / "hf_quant_config.json").get("quantization")
    if isinstance(modelopt, Mapping) and modelopt.get("quant_algo"):
        return Declared(where="hf_quant_config.json", method="modelopt", values=modelopt)
    return None


def _quantisations(config: Any, where: str, depth: int = _DEPTH) -> Iterator[tuple[str, Mapping]]:
    if not isinstance(config, Mapping) or not depth:
        return
    for key, value in config.items():
        if not isinstance(value, Mapping):
            continue
        if key in _KEYS:
            if value:
                yield f"{where}{key}", value
        else:
            yield from _quantisations(value, f"{where}{key}.", depth - 1)
