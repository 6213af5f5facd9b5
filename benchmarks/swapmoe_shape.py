"""Latency of SwapMoE's experiment in the shape of google/switch-base-16, with random weights.

    python benchmarks/make_checkpoint.py switch-base-16 FOLDER
    python benchmarks/swapmoe_shape.py RUN TEXTS FOLDER --points FILE [--rate 0.4GB]

A trained model (`train_switch.py`, the same number of experts) writes held-out sentences, and
requests of the same lengths go through the large shape, whose routers get the logits that the
trained model's had: encoder for encoder, decoder for decoder, block by block in turn. So hits and
misses are a trained model's, and the bytes and the computation those of the shape.

Shapes: N tokens of all requests, E experts.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sentence_task import Pair, pairs
from slow_storage import limited_to
from swapmoe_experiment import CONTEXT, LONGEST, POLICIES, SHARES, Points, timed
from torch import Tensor, nn
from train_switch import LimitedRouters
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import moefit
from moefit.plan.measure import fill_slots
from moefit.serve.model import ServedModel

MEASURED = ("exact", "on-demand", "virtual", "frequency")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--shares", default=",".join(map(str, SHARES)))
    parser.add_argument("--rate", help="bytes per second that storage gives, such as 0.4GB")
    arguments = parser.parse_args()
    words = AutoTokenizer.from_pretrained(arguments.run).get_vocab()
    test = pairs(arguments.texts, words, held_out=True)
    recorded = [*record(arguments.run, test[: arguments.requests + 2])]
    points, given = Points(arguments.points), list(map(float, arguments.shares.split(",")))
    for policy in MEASURED:
        shares = [one for one in given if policy == "exact" or one < 1]
        keys = [{"policy": policy, "share": share, "rate": arguments.rate} for share in shares]
        if all(any(key.items() <= one.items() for one in points.all) for key in keys):
            continue
        with moefit.load(arguments.folder, context=CONTEXT, **POLICIES[policy]) as served:
            replay = Replay(served)
            for key in keys:
                points.measure(
                    key,
                    lambda key=key, served=served, replay=replay: measured(
                        served, replay, recorded, key
                    ),
                )


@dataclass(frozen=True, slots=True)
class Request:
    """A sentence's number of tokens, and the logits of each block's router for them."""

    source: int
    target: int
    logits: list[Tensor]


def record(run: Path, test: list[Pair]) -> list[Request]:
    """Write sentences with the trained model and record its routers."""
    model, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(run),
        AutoTokenizer.from_pretrained(run),
    )
    routers = LimitedRouters(model.eval())
    found = []
    for one in test:
        ids_1S = tokenizer(one.source, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            made_1T = model.generate(input_ids=ids_1S, max_new_tokens=LONGEST, do_sample=False)
            model(input_ids=ids_1S, decoder_input_ids=made_1T[:, :-1])
        logits = [one_1TE[0].clone() for one_1TE in routers.logits.values()]
        found.append(Request(ids_1S.shape[1], made_1T.shape[1] - 1, logits))
    return found


class Replay:
    """Replaces the logits of a served model's routers by those of a request."""

    def __init__(self, served: ServedModel):
        self.request: Request | None = None
        self._at: dict[str, int] = {}
        names = list(served.blocks)
        for number, name in enumerate(names):
            router = served.model.get_submodule(name.replace(".experts", ".router.classifier"))
            router.register_forward_hook(self._hook(name, number, len(names)), prepend=True)

    def start(self, request: Request) -> None:
        """Begin a request."""
        self.request = request
        self._at.clear()

    def _hook(self, name: str, number: int, blocks: int) -> Any:
        def replace(_classifier: nn.Module, _inputs: Any, logits_BTE: Tensor) -> Tensor:
            assert self.request is not None, "start() comes first"
            half = len(self.request.logits) // 2  # of the recorded blocks are in the encoder
            block = number % half + (half if number >= blocks // 2 else 0)
            at, tokens = self._at.get(name, 0), logits_BTE.shape[1]
            self._at[name] = at + tokens
            own_TE = self.request.logits[block][at : at + tokens].roll(number, dims=-1)
            return own_TE[None].to(logits_BTE.dtype)

        return replace


def measured(
    served: ServedModel, replay: Replay, recorded: list[Request], key: dict[str, Any]
) -> dict[str, Any]:
    """Run all requests with a share of the experts; the first two warm."""
    counts = [max(1, round(key["share"] * one.num_experts)) for one in served.blocks.values()]
    served.set_memory(served.budget.total_for_slots(counts))
    if key["policy"] == "frequency":
        served.set_mode("virtual", residency="fixed")
        served.set_residents(dict(zip(served.blocks, map(range, counts), strict=True)))
    fill_slots(served)
    requests = [request_of(served, replay, one) for one in recorded]
    with limited_to(key["rate"]):
        timed(served, requests[:2])
        served.reset()
        found = timed(served, requests[2:])
    return {
        **found,
        "requests": len(requests) - 2,
        "hit_rate": served.report()["hit_rate"],
        "expert_bytes": sum(
            slot.nbytes for one in served.blocks.values() for slot in one.slots.values()
        ),
    }


def request_of(served: ServedModel, replay: Replay, one: Request) -> Callable[[], int]:
    """Return a function that runs a request and returns its number of tokens."""
    generator = torch.Generator().manual_seed(one.source)
    ids_1S = torch.randint(3, 32000, (1, one.source), generator=generator)

    def run() -> int:
        replay.start(one)
        made = served.generate(
            input_ids=ids_1S, max_new_tokens=one.target, min_new_tokens=one.target, do_sample=False
        )
        return made.shape[1] - 1

    return run


if __name__ == "__main__":
    main()
