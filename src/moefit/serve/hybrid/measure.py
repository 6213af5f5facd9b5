"""Measure what an expert costs on each side, while both sides work.

Copies over the link and the kernels of the host both read host memory, so that neither is as fast
beside the other as it is alone. `measure_costs` runs both at once, on experts of the real shape. It
also measures fixed costs: waking the thread of the host, and moving activations.

Shapes: N tokens, D model width.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from moefit.moe.families import MoeBlock
from moefit.serve.cache.slot import Slot
from moefit.serve.hybrid.costs import Costs
from moefit.serve.io.device_copy import CopyEngine
from moefit.serve.layer.expert_executor import ExpertExecutor

_TOKENS = 64  # at which the time per token is measured
_LEAST = 3  # repetitions


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoSides:
    """What is measured.

    Attributes:
        block: Whose experts.
        there: Experts in host memory; several, so that caches of the processor do not hold them.
        here: A slot of the device that may be overwritten.
        engine: Copies between the two.
        inputs_ND: Inputs on the device.
        seconds: Of each measurement, at least.
    """

    block: MoeBlock
    there: Sequence[Slot]
    here: Slot
    engine: CopyEngine
    inputs_ND: Tensor
    seconds: float = 0.1

    @classmethod
    def of(
        cls,
        block: MoeBlock,
        there: Sequence[Slot],
        here: Slot,
        engine: CopyEngine,
        inputs: tuple[int, torch.dtype],
    ) -> "TwoSides":
        """Return them with random inputs of a width D and dtype."""
        width, dtype = inputs
        generator = torch.Generator().manual_seed(0)
        x_ND = torch.randn(_TOKENS, width, generator=generator).to(dtype)
        return cls(
            block=block,
            there=there,
            here=here,
            engine=engine,
            inputs_ND=x_ND.to(here.buffer_B.device),
        )


@torch.inference_mode()
def measure_costs(sides: TwoSides) -> Costs:
    """Return the costs of an expert in seconds; takes about three times `sides.seconds`.

    All times are those beside the other side's work, since a good division keeps both sides busy.
    What a copy takes from the host's bandwidth is in them, and `shared` is therefore 0.
    """
    one, many = (_Both(sides, tokens) for tokens in (1, _TOKENS))
    for both in (one, many):
        both.run()
    start, token = _moving(sides)
    return Costs(
        load=one.load,
        gpu=(one.here, many.here / _TOKENS),
        far=(one.there, many.there / _TOKENS),
        far_read=one.there,
        activations=token,
        start=start,
    )


class _Both:
    """Both sides at work: one copies an expert and computes it, the other computes where they lie.

    Args:
        sides: What is measured.
        tokens: Per expert.

    Attributes:
        load: Mean seconds of a copy.
        here: Mean seconds of an expert on the device.
        there: Mean seconds of an expert in host memory.
    """

    def __init__(self, sides: TwoSides, tokens: int):
        self._sides, self._tokens = sides, tokens
        layout, device = sides.block.layout, sides.here.buffer_B.device
        self._device, self._host = (
            ExpertExecutor(layout, one) for one in (device, torch.device("cpu"))
        )
        self._x_ND = sides.inputs_ND[:tokens]
        self._host_x_ND = self._x_ND.cpu()
        self._stop = threading.Event()
        self._rounds = [0, 0]
        self.load = self.here = self.there = 0.0

    def run(self) -> None:
        """Measure."""
        self._fetch_and_compute(self._sides.there[0])  # what happens once only, such as compiling
        self._compute_there()
        self.load = self.here = self.there = 0.0
        with ThreadPoolExecutor(2) as threads:
            sides = [
                threads.submit(self._go_on, at, work)
                for at, work in enumerate((self._fetch_all, self._compute_there))
            ]
            for one in sides:
                one.result()
        number = len(self._sides.there)
        self.load, self.here = (one / (number * self._rounds[0]) for one in (self.load, self.here))
        self.there /= number * self._rounds[1]

    def _go_on(self, at: int, work: Callable[[], None]) -> None:
        """Work until both sides have worked long enough, or one has failed."""
        began = perf_counter()
        try:
            with torch.inference_mode():
                while not self._stop.is_set():
                    work()
                    self._rounds[at] += 1
                    enough = perf_counter() - began >= self._sides.seconds
                    if enough and min(self._rounds) >= _LEAST:
                        self._stop.set()
        finally:
            self._stop.set()

    def _fetch_all(self) -> None:
        for slot in self._sides.there:
            self._fetch_and_compute(slot)

    def _fetch_and_compute(self, slot: Slot) -> None:
        began = perf_counter()
        self._sides.engine.copy(slot.buffer_B, self._sides.here.buffer_B)
        copied = perf_counter()
        _compute(self._device, [self._sides.here], self._x_ND)
        self._sides.engine.settle()
        self.load += copied - began
        self.here += perf_counter() - copied

    def _compute_there(self) -> None:
        began = perf_counter()
        _compute(self._host, self._sides.there, self._host_x_ND)
        self.there += perf_counter() - began


def _compute(executor: ExpertExecutor, slots: Sequence[Slot], x_ND: Tensor) -> None:
    """Compute each expert for each token."""
    tokens = len(x_ND)
    y_RD = x_ND.new_empty(tokens * len(slots), x_ND.shape[1], dtype=torch.float32)
    rows = torch.arange(len(y_RD), device=x_ND.device).view(tokens, len(slots)).unbind(1)
    executor.outputs(x_ND, list(zip(slots, rows, strict=True)), len(slots), y_RD)


def _seconds(run: Callable[[], object], least: float) -> float:
    """Return the time of a run, the mean of at least `_LEAST` and so many seconds."""
    run()
    began, runs = perf_counter(), 0
    while runs < _LEAST or perf_counter() - began < least:
        run()
        runs += 1
    return (perf_counter() - began) / runs


def _moving(sides: TwoSides) -> tuple[float, float]:
    """Return the fixed time of moving activations there and back by a thread, and a token's."""
    engine = sides.engine
    with ThreadPoolExecutor(1) as thread:

        def there_and_back(tokens: int) -> Callable[[], None]:
            def move(ordered) -> Tensor:
                with torch.inference_mode(), ordered:
                    return engine.to_host(sides.inputs_ND[:tokens])

            def run() -> None:
                engine.to_device(thread.submit(move, engine.ordered()).result())
                engine.settle()

            return run

        one, many = (_seconds(there_and_back(n), sides.seconds / 2) for n in (1, _TOKENS))
    token = max(0.0, many - one) / (_TOKENS - 1)
    return max(0.0, one - token), token
