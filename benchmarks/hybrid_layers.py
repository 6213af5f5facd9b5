"""Time layers whose misses are divided between a device behind a slow link and host memory.

The device is a stand-in in the same process: its slots are filled through a copy of limited
bandwidth, and it computes on the calling thread, the host on another one. Each layer's time is
compared with the model that the rules use (the longer of both sides), with costs measured as at the
start of a server. Run it with OMP_NUM_THREADS=1, which leaves a core to each side.

On two cores, the threads of a stand-in slow each other down as a GPU and a host do not. So both
sides compute at a limited bandwidth too (--compute-rate), and sleep for the rest; 0 is no limit.
"""

import argparse
import statistics
import threading
import time
from collections.abc import Iterable
from typing import Any
from unittest import mock

import record
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from moefit.moe.layouts import find_blocks
from moefit.moe.routing import Routing
from moefit.quant.format import parse_format
from moefit.serve.cache.eviction import LeastRecentlyUsed
from moefit.serve.cache.host_cache import HostCache
from moefit.serve.cache.slot import Slot, allocate_slot
from moefit.serve.cache.slot_table import SlotTable
from moefit.serve.hybrid import host_experts, measure
from moefit.serve.hybrid.costs import Costs
from moefit.serve.hybrid.host_experts import HostExperts, HostSide
from moefit.serve.hybrid.measure import TwoSides, measure_costs
from moefit.serve.hybrid.rules import RULES, Rule, layer_time
from moefit.serve.io.device_copy import CpuCopies
from moefit.serve.io.loads import Transfer
from moefit.serve.layer import executor
from moefit.serve.layer.executor import ExpertInvoker
from moefit.serve.layer.expert_executor import ExpertExecutor, FusedExperts
from moefit.serve.stats import Counters

EXPERTS, CHOSEN, WIDTH, INNER = 64, 8, 2048, 1024
AIM = 0.15  # by which the median of measured over modelled time may exceed 1


class SlowLink(CpuCopies):
    """Copies one after the other at so many bytes per second."""

    def __init__(self, rate: float):
        self.rate, self._lock = rate, threading.Lock()

    def copy(self, source_B, target_B) -> None:
        with self._lock:
            began = time.perf_counter()
            super().copy(source_B, target_B)
            time.sleep(max(0.0, source_B.nbytes / self.rate - (time.perf_counter() - began)))


def limited(rate: float) -> Any:
    """Return executors of this many bytes of weights per second."""

    class SlowExecutor(ExpertExecutor):
        def output(self, slot, x_RD):
            raise NotImplementedError("kernels compute these experts")

        def fused(self, slots: Iterable[Slot]) -> Any:
            found = super().fused(list(slots))
            return None if found is None else Slowed(found, rate)

    return SlowExecutor


class Slowed:
    """Kernels that take at least the time of reading their experts at this rate."""

    def __init__(self, fused: FusedExperts, rate: float):
        self._fused, self._rate, self.kernels = fused, rate, fused.kernels

    def _slow(self, began: float, slots: Any) -> None:
        least = sum(slot.nbytes for slot in slots) / self._rate
        time.sleep(max(0.0, least - (time.perf_counter() - began)))

    def token(self, x_1D, slots, weights_1K, *, energy):
        began = time.perf_counter()
        found = self._fused.token(x_1D, slots, weights_1K, energy=energy)
        self._slow(began, slots)
        return found

    def one_token(self, x_1D, slot_of_row, y_KD):
        began = time.perf_counter()
        self._fused.one_token(x_1D, slot_of_row, y_KD)
        self._slow(began, slot_of_row.values())

    def outputs(self, x_TD, batch, num_choices, y_RD):
        began = time.perf_counter()
        self._fused.outputs(x_TD, batch, num_choices, y_RD)
        self._slow(began, [slot for slot, _ in batch])


class OneExpert:
    """An `ExpertReader` whose experts all have the same bytes."""

    def __init__(self, slot: Slot):
        self.slot = slot

    def read(self, block: str, expert: int, into: Slot) -> None:
        with torch.inference_mode():
            into.buffer_B.copy_(self.slot.buffer_B)


def encoded(block: Any, name: str) -> Slot:
    """Return one random expert of OLMoE's shape."""
    specs, format = block.layout.specs, parse_format(name)
    generator = torch.Generator().manual_seed(0)
    native = {
        one: (torch.randn(spec.shape, generator=generator) * 0.02).to(spec.dtype)
        for one, spec in specs.items()
    }
    slot = allocate_slot(format, specs, torch.device("cpu"))
    format.encode(slot.tensors, native, specs)
    return slot


class Layer:
    """OLMoE's block with some slots behind a link, all experts in host memory."""

    def __init__(self, block: Any, expert: Slot, slots: int, rate: float):
        self.block, self.link = block, SlowLink(rate)
        self.cache = HostCache(OneExpert(expert), self.link, limit=EXPERTS * expert.nbytes)
        self.transfer = Transfer(self.cache, readers=2, engine=self.link)
        self.policy = LeastRecentlyUsed()
        self.table = SlotTable(EXPERTS, slots, self.policy)
        self.slots = {
            at: allocate_slot(expert.format, expert.specs, torch.device("cpu"))
            for at in range(slots)
        }
        self.invoke = ExpertInvoker(block, self.table, self.slots, self.transfer, Counters())
        for one in range(EXPERTS):
            self.cache.warm(block.name, one, expert)

    def costs(self) -> Costs:
        held = [self.cache.hold(self.block.name, one, self.slots[0]) for one in range(EXPERTS)]
        there = [one.slot for one in held if one is not None]
        sides = TwoSides.of(self.block, there, self.slots[0], self.link, (WIDTH, torch.bfloat16))
        found = measure_costs(sides)
        for one in held:
            assert one is not None
            self.cache.release(one)
        return found

    def run(self, costs: Costs, rule: Rule, tokens: int, steps: int) -> dict[str, float]:
        """Return times and what the model says of the divided layers, in milliseconds."""
        asked: list[tuple[float, float]] = []

        def recording(costs: Costs, absent: Any, resident: Any) -> int:
            number = rule(costs, absent, resident)
            asked.append(layer_time(costs, absent, resident, number))
            return number

        side = HostSide(self.cache, self.link, costs, recording)
        self.invoke.host = HostExperts(self.block, side, {})
        generator, times, model = torch.Generator().manual_seed(1), [], []
        popular_E = torch.linspace(1.5, 0, EXPERTS)
        for step in range(steps + 3):
            noise_TE = torch.rand(tokens, EXPERTS, generator=generator).log().neg().log().neg()
            ids_TK = (popular_E + noise_TE).topk(CHOSEN).indices
            routing = Routing(ids_TK, torch.full((tokens, CHOSEN), 1 / CHOSEN))
            x_TD = torch.randn(tokens, WIDTH, generator=generator).to(torch.bfloat16)
            self.policy.observe({int(one): 1.0 for one in ids_TK.unique()})
            asked.clear()
            began = time.perf_counter()
            self.invoke(x_TD, routing)
            took = time.perf_counter() - began
            if asked and step >= 3:
                times.append(took)
                model.append(asked[0])
        side.close()
        ratios = [one / max(two) for one, two in zip(times, model, strict=True)]
        return {
            "layers": len(times),
            "milliseconds": 1e3 * statistics.mean(times),
            "model": 1e3 * statistics.mean(map(max, model)),
            "model_device": 1e3 * statistics.mean(device for device, _ in model),
            "model_host": 1e3 * statistics.mean(far for _, far in model),
            "median_ratio": statistics.median(ratios),
        }

    def close(self) -> None:
        self.transfer.close()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="GB/s")
    parser.add_argument("--compute-rate", type=float, default=2.0, help="GB/s of weights; 0: free")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=[*RULES])
    parser.add_argument("--repeats", type=int, default=1, help="of all layers, costs too")
    parser.add_argument("--suffix", default="", help="of the record")
    parser.add_argument("--format", default="int8")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = OlmoeConfig(
        num_hidden_layers=1, hidden_size=WIDTH, intermediate_size=INNER, num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN, vocab_size=64, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        block = find_blocks(OlmoeForCausalLM(config))[0]
    if given.compute_rate:
        slow = limited(given.compute_rate * 1e9)
        for module in (measure, host_experts, executor):
            mock.patch.object(module, "ExpertExecutor", slow).start()
    expert, results = encoded(block, given.format), []
    for rate in given.rates * given.repeats:
        layer = Layer(block, expert, given.slots, rate * 1e9)
        costs = layer.costs()
        print(f"{rate:g} GB/s: {costs}")
        for tokens in given.tokens:
            for name in given.rules:
                rule = RULES[name]
                steps = max(6, given.steps // max(1, tokens // 8))
                found = layer.run(costs, rule, tokens, steps)
                results.append({"rate": rate, "tokens": tokens, "rule": name} | found)
                print(
                    {k: round(v, 3) if isinstance(v, float) else v for k, v in results[-1].items()}
                )
        results.append({"rate": rate, "costs": {
            name: getattr(costs, name) for name in costs.__slots__
        }})  # fmt: skip
        layer.close()
    worse = [one for one in results if one.get("median_ratio", 0) > 1 + AIM]
    divided = sum("rule" in one for one in results)
    print(f"{divided - len(worse)} of {divided} medians within {AIM:.0%} of the model")
    results.append({"within": AIM, "medians": divided, "beyond": len(worse)})
    if given.record:
        notes = (
            f"OLMoE's block ({EXPERTS} experts, {CHOSEN} a token, {expert.nbytes} bytes in "
            f"{given.format}), {given.slots} slots behind a link of limited bandwidth, one thread "
            f"for each side, which computes {given.compute_rate:g} GB/s of weights at most (0: no "
            "limit). milliseconds: of layers with misses; model: the longer of both sides."
        )
        print(record.write("hybrid-layers", results, notes=notes, suffix=given.suffix))


if __name__ == "__main__":
    main()
