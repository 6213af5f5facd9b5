"""Which operations of a model may round an answer otherwise when other requests share its steps.

Kernels sum each output in an order that depends on its own row and token alone. torch chooses
algorithms by shape and number of threads, and rounds some functions by the place of an element. So
a few tokens are computed by the engine's own runner, and every operation of torch that is not exact
row by row is recorded with the module that called it. Experts are judged by their layout.

Shapes: T tokens, W values per token.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moefit.quant.backend import backend_status
from moefit.quant.cpu_kernels import kernels
from moefit.serve.config import Policy
from moefit.serve.layer.expert_executor import fused_experts
from moefit.serve.layer.moe_layer import VirtualExperts


@dataclass(frozen=True, slots=True, order=True)
class Uncovered:
    """An operation whose result may depend on what else is computed.

    Attributes:
        module: Name of the module that calls it, with `*` for the numbers of layers.
        reason: What it is.
    """

    module: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Invariance:
    """Whether answers depend on the other requests of the batch and the number of threads.

    Attributes:
        not_covered: Operations that may.
        deterministic: Whether requests are computed one by one for that reason, so that answers do
            not depend on other requests in any case.
    """

    not_covered: tuple[Uncovered, ...]
    deterministic: bool = False

    @property
    def covered(self) -> bool:
        """Whether no operation may."""
        return not self.not_covered

    def describe(self) -> str:
        """Return a line for people."""
        if self.covered:
            return "answers do not depend on other requests or the number of threads"
        first, *others = self.not_covered
        more = f" and {len(others)} more" if others else ""
        listed = f"{first.module}: {first.reason}{more}"
        if self.deterministic:
            return (
                f"requests are computed one by one, with the same answers beside others ({listed})"
            )
        return (
            f"note: other requests may change an answer's last bits ({listed}; GET /v1/memory "
            "lists all); --deterministic computes requests one by one"
        )


_PRODUCTS = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "inner"),
    *("matmul", "linear", "einsum", "tensordot", "bilinear", "_grouped_mm", "cdist"),
}
_PREFIXES = {
    "scaled_dot_product": "attention computed by torch",
    "_scaled_dot_product": "attention computed by torch",
    "_flash_attention": "attention computed by torch",
    "conv": "a convolution computed by torch",
    "_convolution": "a convolution computed by torch",
    "mkldnn_conv": "a convolution computed by torch",
    "linalg_": "linear algebra computed by torch",
}
_GRAIN = 32768  # elements from which torch divides a function among threads
# Elements of one step of torch's widest loop: two vectors of 512 bits.
_LANES = {4: 32, 2: 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSizes:
    """How large steps become. `tokens`: most tokens of one step; `threads`: of torch."""

    tokens: int
    threads: int


class _Recorder(TorchDispatchMode):
    """Records operations of torch that may round by what else is computed.

    Attributes:
        found: What was recorded.
    """

    def __init__(self, model: nn.Module, sizes: StepSizes):
        super().__init__()
        self._sizes, self._modules, self._tokens = sizes, [type(model).__name__], 1
        self.found: set[Uncovered] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and record it."""
        reason = _product(func, args) or self._elementwise(func, args, kwargs or {})
        if reason is not None:
            self.found.add(Uncovered(self._modules[-1], reason))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Record operations within the block, with the modules whose forward passes run."""
        hooks = []
        for name, module in model.named_modules():
            begin = partial(self._begin, _general(name) or type(model).__name__)
            hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            hooks.append(module.register_forward_hook(self._end, always_call=True))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, name: str, _module: nn.Module, _args: Any, named: dict[str, Any]) -> None:
        self._modules.append(name)
        for key in ("input_ids", "decoder_input_ids"):
            if isinstance(ids := named.get(key), Tensor):
                self._tokens = ids.numel()

    def _end(self, *_: Any) -> None:
        self._modules.pop()

    def _elementwise(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> str | None:
        """Return what is wrong with a function of each element, or None."""
        if torch.Tag.pointwise not in func.tags or not args or not _is_float(args[0]):
            return None
        if any(isinstance(one, Tensor) for one in (*args[1:], *kwargs.values())):
            return None  # sums, products and choices of two values are rounded once
        x, tokens = args[0], self._tokens
        width = x.numel() // tokens if x.numel() % tokens == 0 else x.numel()
        options = tuple(args[1:]), tuple(sorted(kwargs.items()))
        if _is_whole(width, x.dtype, self._sizes) or not _rounds_by_place(func, x.dtype, options):
            return None
        name, dtype = _name(func).rstrip("_"), str(x.dtype).removeprefix("torch.")
        return f"{name} of {width} in {dtype}, which torch rounds by an element's place"


def _name(func: Any) -> str:
    return func._schema.name.partition("::")[2]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _product(func: Any, args: Sequence[Any]) -> str | None:
    """Return what is wrong with a sum of products, or None."""
    name = _name(func)
    if name in _PRODUCTS:
        tensors = [one for one in args if _is_float(one) and one.dim()]
        if not tensors and name != "einsum":
            return None
        factor = tensors[1 if name in ("addmm", "baddbmm", "addbmm", "addmv") else 0 :]
        if factor and factor[0].shape[-1] == 1:
            return None  # one product, no sum
        return f"a matrix product computed by torch ({name})"
    return next((why for prefix, why in _PREFIXES.items() if name.startswith(prefix)), None)


def _is_whole(width: int, dtype: torch.dtype, sizes: StepSizes) -> bool:
    """Return whether each token's values fill whole vectors, however they are divided."""
    lanes = _LANES.get(dtype.itemsize, 64)
    parts = min(sizes.threads, -(-width * sizes.tokens // _GRAIN))
    return all(width % (lanes * part) == 0 for part in range(1, max(1, parts) + 1))


@cache
def _rounds_by_place(func: Any, dtype: torch.dtype, options: tuple[Any, Any]) -> bool:
    """Return whether a function's result depends on the place of an element in its tensor."""
    arguments, named = options[0], dict(options[1])
    x = (2 * torch.randn(160, generator=torch.Generator().manual_seed(0))).to(dtype)
    together = func(x.clone(), *arguments, **named)
    apart = torch.cat([func(one.clone(), *arguments, **named) for one in x.split(1)])
    return not torch.equal(together.nan_to_num(), apart.nan_to_num())


def _general(name: str) -> str:
    """Return a module's name with `*` for numbers of layers.

    >>> _general("model.layers.11.mlp.gate")
    'model.layers.*.mlp.gate'
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def of_policy(policy: Policy, *, adapts: bool) -> tuple[Uncovered, ...]:
    """Return what else an answer depends on while it is served in this way.

    Args:
        policy: For experts that are not resident.
        adapts: Whether formats of experts follow their use.
    """
    modes = [mode for mode in (policy.mode, policy.prefill) if mode != "exact"]
    found = [
        Uncovered("experts", f"mode {mode} depends on which experts are in memory")
        for mode in dict.fromkeys(modes)
    ]
    if adapts:
        found.append(Uncovered("experts", "precision auto changes formats while requests run"))
    return tuple(found)


def uncovered_experts(blocks: Iterable[VirtualExperts], device: torch.device) -> set[Uncovered]:
    """Return the blocks whose experts are computed by torch."""
    reason = "experts computed by torch: kernels know two matrices with output units in rows"
    return {
        Uncovered(_general(one.block.name), reason)
        for one in blocks
        if (fused := fused_experts(one.block.layout, device)) is None
        or not fused.computes(one.slots.values())
    }


def find_uncovered(
    model: nn.Module,
    blocks: Iterable[VirtualExperts],
    device: torch.device,
    sizes: StepSizes,
    run: Callable[[], object],
) -> tuple[Uncovered, ...]:
    """Return the operations of a model that may round by what else is computed.

    Args:
        model: The model.
        blocks: Its experts modules.
        device: Where it is.
        sizes: How large steps become.
        run: Computes some steps with it.
    """
    if device.type != "cpu" or kernels() is None:
        return (Uncovered("all", f"no compiled kernels ({backend_status(device)})"),)
    recorder = _Recorder(model, sizes)
    with recorder.following(model):
        run()
    return tuple(sorted(recorder.found | uncovered_experts(blocks, device)))
