"""What the tests of parallel training do in each of several processes; see `processes.start`.

Arguments: a folder, with `tree.json` (settings of a small run), and names of cases. Process 0
writes the results of the cases by name into `results.json`; the last case may kill a process.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from moefit.errors import ConfigError, ElsewhereError, MoefitError
from moefit.train import loop, trainer
from moefit.train.balancing import BalancingBias
from moefit.train.config import make_config
from moefit.train.display import NoDisplay
from moefit.train.loop import train
from moefit.train.model import build_model, loss_weights
from moefit.train.optimizer import make_optimizer
from moefit.train.parallel.locality import NodeLocality
from moefit.train.parallel.parallelism import parallelism
from moefit.train.parallel.processes import (
    OneProcess,
    Processes,
    _check_machines,
    joined_processes,
)
from moefit.train.step import Stepper, make_losses

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
}
MODELS = {
    "dsmoe": (
        {**SHAPE, "num_attention_experts": 2},
        {"mlp_mi": 0.05, "attention_mi": 0.05, "z": 1e-3},
    ),
    "dense": ({**SHAPE, "num_experts": 1}, {}),
    "sparse": ({**SHAPE, "training_rule": "top_k:2"}, {"load_balancing": 0.01}),
    "lopsided": (  # all tokens to the same experts, which are computed one by one
        {**SHAPE, "training_rule": "top_k:2", "intermediate_size": 264},
        {},
    ),
    "olmoe": (
        {"architecture": "olmoe", **SHAPE, "num_experts_per_tok": 2},
        {"load_balancing": 0.01, "mlp_mi": 0.05},
    ),
    "hash": (
        {**SHAPE, "router_type": "hash", "training_rule": "top_k:1", "inference_rule": "top_k:1"},
        {},
    ),
    "biased": (
        {**SHAPE, "training_rule": "top_k:2", "inference_rule": "top_k:2"},
        {"balancing_bias": 0.1},
    ),
}
CLAIMED = ("dsmoe", "dense", "sparse", "olmoe")
OPTIMIZERS = {"olmoe": {"name": "muon"}}


LOCMOE = {**SHAPE, "router_type": "grap", "training_rule": "top_k:1", "inference_rule": "top_k:1"}
SPREAD = {"experts": "all_to_all", "nodes": 2}
TENSOR = {"expert_tensor": 2}


def steps(
    name: str,
    processes: Processes,
    dtype: torch.dtype,
    parallel_settings: dict,
    *,
    compile: bool = False,
    count: int | None = None,
):
    """Return losses and gradient norms of steps of 2 micro-batches each, the weights, and dtypes.

    Dtypes are those of routers' logits, and of the weights that this process updates.
    """
    model, loss = MODELS[name]
    count = count or (5 if name in CLAIMED else 3)
    config = make_config(
        {
            "model": model, "loss": loss, "batch_size": 4, "seq_len": 16, "accumulation": 2,
            "steps": count, "optimizer": {"warmup_steps": 0, **OPTIMIZERS.get(name, {})},
            "parallel": parallel_settings,
        }
    )  # fmt: skip
    made = build_model(config, vocab_size=64, eos_token_id=0).to(dtype)
    made.train()
    if name == "lopsided":
        for layer in made.model.layers:
            layer.mlp.gate.weight.data.zero_()
            layer.mlp.gate.weight.requires_grad = False
    cpu = torch.device("cpu")
    parallel = parallelism(config, processes, cpu)
    parallel.wrap(made)
    balancing = BalancingBias.of(config, made)
    losses = make_losses(made, loss_weights(config, made), compile=compile, total=parallel.total)
    stepper = Stepper(
        model=made, optimizer=make_optimizer(made, config.optimizer), losses=losses, device=cpu,
        bf16=False, clip=1.0, parallel=parallel,
    )  # fmt: skip
    chance = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        batches = [torch.randint(0, 64, (4, 17), generator=chance) for _ in range(2)]
        result = stepper.step(batches, 2)
        if balancing is not None:
            balancing.update(processes)
        rows.append((result.lm_loss, result.router_loss, result.gradient_norm))
    whole = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in made.parameters()]
    whole += balancing.biases if balancing is not None else ()
    logits = (*result.mlp_logits, *result.attention_logits)
    dtypes = [sorted({str(one.dtype) for one in some}) for some in (logits, made.parameters())]
    return rows, whole, dtypes


MIXED = {"mixed_precision": "bf16"}


def mixed(processes: Processes) -> dict[str, list]:
    """Return, per case, numbers and dtypes of mixed precision, and those of one process.

    Process 0 alone compares: also with float32, to which mixed precision must not be equal.
    """
    found = {}
    cases = {"dsmoe": {}, "olmoe": {}, "dsmoe tensor": TENSOR, "sparse spread": SPREAD}
    for case, settings in cases.items():
        name = case.split()[0]
        numbers, _, dtypes = steps(name, processes, torch.float32, {**settings, **MIXED})
        if processes.is_main:
            expected, _, dtypes_of_one = steps(name, OneProcess(), torch.float32, MIXED)
            exact = steps(name, OneProcess(), torch.float32, {})[0]
            found[case] = [numbers, expected, exact, dtypes, dtypes_of_one]
    return found


def compiled(processes: Processes, settings: dict) -> list:
    """Return numbers of a sparse model: compiled, and not; and dtypes of both."""
    found = []
    for compile in (True, False):
        numbers, _, dtypes = steps("sparse", processes, torch.float32, settings, compile=compile)
        found += [numbers, dtypes]
    return found


def equality(processes: Processes, names: list[str], settings: dict) -> dict[str, list[float]]:
    """Return, per model, the differences from one process: of numbers, and of weights.

    Numbers are of 5 steps in float32 and in float64, or of 3 in float64 alone for models that are
    here for one fault, if there are two processes; weights are in float64. Process 0 compares.
    """
    found = {}
    for name in names:
        both = name in CLAIMED or processes.size > 2
        count = 5 if both else 3
        numbers, weights, _ = steps(name, processes, torch.float64, settings, count=count)
        if both:
            numbers += steps(name, processes, torch.float32, settings, count=count)[0]
        if not processes.is_main:
            continue
        expected, wanted, _ = steps(name, OneProcess(), torch.float64, settings, count=count)
        if both:
            expected += steps(name, OneProcess(), torch.float32, settings, count=count)[0]
        found[name] = [
            float((torch.tensor(numbers) - torch.tensor(expected)).abs().max()),
            max(float((a - b).abs().max()) for a, b in zip(weights, wanted, strict=True)),
        ]
    return found


def equalised(processes: Processes) -> bool:
    """Return whether `clip` makes different gradients of a group equal, outside the experts."""
    config = make_config({"model": SHAPE, "batch_size": 4, "parallel": TENSOR})
    model = build_model(config, vocab_size=64, eos_token_id=0)
    parallel = parallelism(config, processes, torch.device("cpu"))
    parallel.wrap(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, processes.rank)
    parallel.clip(model, 1e9)
    expected = {True: float(processes.rank), False: 0.5}
    return all(
        bool((p.grad.to_local() == expected["experts" in name]).all())
        for name, p in model.named_parameters()
    )


def bf16_traffic(processes: Processes) -> list[float]:
    """Return losses of a step in bf16, of spread experts and of one process, and bytes sent."""
    model = {**SHAPE, "training_rule": "top_k:2"}
    config = make_config({"model": model, "batch_size": 4, "seq_len": 16, "parallel": SPREAD})
    cpu, found = torch.device("cpu"), []
    for those in (processes, OneProcess()):
        made = build_model(config, vocab_size=64, eos_token_id=0)
        made.train()
        parallel = parallelism(config, those, cpu)
        parallel.wrap(made)
        stepper = Stepper(
            model=made,
            optimizer=make_optimizer(made, config.optimizer),
            losses=make_losses(made, loss_weights(config, made), compile=False),
            device=cpu,
            bf16=True,
            clip=1.0,
            parallel=parallel,
        )
        result = stepper.step([torch.arange(68).view(4, 17) % 64], 1)
        found += [result.lm_loss, result.gradient_norm]
        if parallel.dispatch is not None:
            report = parallel.dispatch.report(1)
            found.append(report["all_to_all_bytes"] / report["cross_node_share"])
        if not processes.is_main:
            break
    return found


GROUPS = {
    "expert": {**SPREAD, "expert": 2},
    "replicate": {**SPREAD, "replicate": 2},
    "long way": {**SPREAD, "nodes": 4, "expert": 2, "all_to_all": "hierarchical"},
    "one group": {**SPREAD, "replicate": 2, "expert": 4},
}
"""Ways to spread experts over two groups of two processes, and over all of two copies."""
LONG_WAY = {**SPREAD, "all_to_all": "hierarchical"}
WAYS = {
    "top 1": ({**SHAPE, "num_experts": 8, "training_rule": "top_k:1"}, {}),
    "top 4": (
        {**SHAPE, "num_experts": 8, "training_rule": "top_k:4", "mlp_type": "gelu"},
        {"capacity_factor": 1.2},
    ),
    "olmoe": ({"architecture": "olmoe", **SHAPE, "num_experts_per_tok": 3}, {}),
    "same experts": ({**SHAPE, "training_rule": "top_k:2"}, {}),
}


def ways(processes: Processes, precision: str) -> dict[str, list]:
    """Return, per model, numbers that differ between the ways of tokens, and reports of traffic.

    Numbers are the logits of 3 steps, and the gradients of their last.
    """
    found = {}
    for name, (model, more) in WAYS.items():
        done = [one_way(processes, name, model, {**way, **more}, precision)
                for way in (SPREAD, LONG_WAY)]  # fmt: skip
        (flat, traffic), (long, less) = done
        unequal = sum(int((a != b).sum()) for a, b in zip(flat, long, strict=True))
        most = max(float((a - b).abs().max()) for a, b in zip(flat, long, strict=True))
        found[name] = [sum(processes.every(unequal)), max(processes.every(most)), traffic, less]
    return found


def one_way(
    processes: Processes, name: str, model: dict, settings: dict, precision: str
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """Return what `ways` compares, of one of them."""
    mixed_precision = {"mixed_precision": "bf16"} if precision == "mixed" else {}
    config = make_config(
        {
            "model": model, "batch_size": 4, "seq_len": 16, "steps": 3,
            "optimizer": {"warmup_steps": 0}, "parallel": {**settings, **mixed_precision},
        }
    )  # fmt: skip
    made = build_model(config, vocab_size=64, eos_token_id=0).train()
    if name == "same experts":  # most processes receive nothing
        for layer in made.model.layers:
            layer.mlp.gate.weight.data.zero_()
    parallel = parallelism(config, processes, torch.device("cpu"))
    parallel.wrap(made)
    NodeLocality.of(config, made, parallel)
    optimizer = make_optimizer(made, config.optimizer)
    chance = torch.Generator().manual_seed(1)
    found = []
    for _ in range(3):
        ids = parallel.share(torch.randint(0, 64, (4, 17), generator=chance))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast"):
            logits = made(ids, use_cache=False).logits.float()
        (logits.logsumexp(-1) - logits[..., 0]).mean().backward()
        found.append(logits.detach())
        gradients = [p.grad for p in made.parameters() if p.grad is not None]
        optimizer.step()
    found += [one.to_local().clone() for one in gradients]
    return found, parallel.dispatch.report(3)


def limits(processes: Processes) -> dict[str, dict[str, float]]:
    """Return reports of traffic of tokens that use experts of some machines only."""
    model, found = WAYS["top 4"][0], {}
    for limit in ("own", 1, None):
        machines = {"nodes": processes.size, "node_limit": limit}
        rule = {"training_rule": "top_k:4" if processes.size == 2 else "top_k:2"}
        settings = {**LONG_WAY, **machines}
        report = one_way(processes, "", {**model, **rule}, settings, "fp32")[1]
        found[str(limit)] = report
    return found


class Signals(NoDisplay):
    """Sends a signal to its own process after a step."""

    def __init__(self, step: int, number: signal.Signals):
        self.step, self.number = step, number

    def on_step(self, step: int, values: dict[str, float]) -> None:
        """Send the signal at its step."""
        if step == self.step:
            os.kill(os.getpid(), self.number)


def run(tree: dict, processes: Processes, detail: str) -> str:
    """Train in the subfolder NAME of NAME[:STOP], stopped by SIGTERM to process 0 alone."""
    name, _, stopped = detail.partition(":")
    stop = int(stopped or 0)
    config = make_config({**tree, "out": str(Path(sys.argv[1]) / name)})
    result = train(config, Signals(stop, signal.SIGTERM), processes)
    assert (result.stopped_by == "SIGTERM") == bool(stop)
    return str(result.checkpoint)


def locmoe(tree: dict) -> dict:
    """Return settings of a LocMoE on two machines of one process each, with a text of its own."""
    sources = [str(Path(sys.argv[1]) / name) for name in ("letters", "digits")]
    return {
        **tree,
        "model": LOCMOE,
        "loss": {"load_balancing": 0.01, "locality": 1.0},
        "data": {**tree["data"], "sources": sources, "shard_by": "source"},
        "optimizer": {"lr": 1e-2, "warmup_steps": 0},
        "parallel": SPREAD,
        "log": {**tree["log"], "eval_every": 16},
        "checkpoint": {"every": 16},
        "steps": 16,
    }


def muon(tree: dict) -> dict:
    """Return settings of a run with Muon."""
    return {**tree, "optimizer": {"name": "muon", "warmup_steps": 2}, "steps": 6}


def mixed_run(tree: dict) -> dict:
    """Return settings of a run in mixed precision."""
    more = {"activation_checkpointing": True, "steps": 6}
    return {**tree, "precision": "auto", "parallel": MIXED, **more}


def weighted(tree: dict) -> dict:
    """Return settings of a run that draws from two sources."""
    sources = [
        {"path": str(Path(sys.argv[1]) / name), "weight": weight}
        for name, weight in (("letters", 0.25), ("digits", 0.75))
    ]
    return {**tree, "data": {**tree["data"], "sources": sources}, "steps": 4}


def six(tree: dict) -> dict:
    """Return settings of a run with Muon and 6 experts, which 4 processes divide unequally."""
    return {**muon(tree), "model": {**tree["model"], "num_experts": 6}}


def sparse(tree: dict) -> dict:
    """Return settings of a run of a sparse model."""
    model, loss = {"training_rule": "top_k:2"}, {"load_balancing": 0.01}
    return {**tree, "model": {**tree["model"], **model}, "loss": loss}


def twelve(tree: dict) -> dict:
    """Return settings of a run that 1, 2, 3 or 4 processes can share."""
    return {**tree, "batch_size": 12, "steps": 12}


def failures(tree: dict, processes: Processes) -> list[str]:
    """Return what process 0 reports for settings that cannot be trained with."""
    rank = processes.rank
    attempts = [
        {**tree, "seed": rank},
        {**tree, "batch_size": 3},
        {**tree, "parallel": {"replicate": 3}},
        {**tree, "parallel": SPREAD},
        {**locmoe(tree), "parallel": {**SPREAD, "nodes": 1}},
        {**tree, "optimizer": {"lr": 1e20, "warmup_steps": 0, "clip": 1e20}},
        {**tree, "model": {**tree["model"], "num_experts": 3}, "parallel": TENSOR},
        {**tree, "out": "/dev/null/run"},
        {**tree, "out": "not_shared"},  # below the working folder, which differs
        {**tree, "data": {**tree["data"], "cache_dir": "not_shared"}},
        {**locmoe(tree), "parallel": {**LONG_WAY, "nodes": 1}, "loss": {}},
    ]
    said = []
    with suppress(ElsewhereError):
        try:
            _check_machines(processes, 1 + rank)
        except ConfigError as error:
            said.append(str(error))
    loop._VISIBLE_SECONDS = 0.2
    (Path(sys.argv[1]) / str(rank)).mkdir()
    os.chdir(Path(sys.argv[1]) / str(rank))
    for index, one in enumerate(attempts):
        out = str(Path(sys.argv[1]) / f"failed{index}")
        config = make_config({**one, "out": out if one["out"] == tree["out"] else one["out"]})
        try:
            train(config, NoDisplay(), processes)
        except ElsewhereError:
            assert rank > 0
        except MoefitError as error:
            assert rank == 0, error
            said.append(f"{type(error).__name__}: {error}")
    return said


def killed(tree: dict, processes: Processes) -> None:
    """Train until the last process kills itself in step 7, after the third save."""
    tree = {**tree, "checkpoint": {"every": 2}, "log": {"every": 1, "eval_every": 100}}
    config = make_config({**tree, "out": str(Path(sys.argv[1]) / "killed")})
    if processes.rank == processes.size - 1:
        processes = _Dying(processes, decisions=13)  # two a step
    train(config, NoDisplay(), processes)


class _Dying:
    """The processes of a run, of which this one is killed at a decision whether to stop."""

    def __init__(self, real: Processes, decisions: int):
        self._real, self._left = real, decisions

    def __getattr__(self, name: str):
        return getattr(self._real, name)

    def most(self, value: int) -> int:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._real.most(value)


def main() -> None:
    """Run the cases."""
    folder, cases = Path(sys.argv[1]), sys.argv[2:]
    tree = json.loads((folder / "tree.json").read_text())
    torch.set_num_threads(1)
    trainer.measured_peak_flops = lambda *_: 1e9
    loop.draw_curve = lambda *_: None
    done: dict[str, object] = {}
    with joined_processes() as processes:
        actions: dict[str, Callable[[str], object]] = {
            "equality": lambda copies: equality(
                processes, list(CLAIMED), {"replicate": int(copies or 1)}
            ),
            "tensor": lambda names: equality(processes, names.split(","), TENSOR),
            "spread": lambda names: equality(
                processes, ["sparse", "olmoe", "lopsided", *filter(None, names.split(","))], SPREAD
            ),
            "groups": lambda way: equality(processes, ["sparse", "olmoe", "lopsided"], GROUPS[way]),
            "one_group": lambda name: equality(
                processes, [name], {**SPREAD, "replicate": 2, "expert": 2}
            ),
            "long_way": lambda _: equality(processes, ["sparse", "olmoe", "lopsided"], LONG_WAY),
            "ways": lambda precision: ways(processes, precision),
            "limits": lambda _: limits(processes),
            "equalised": lambda _: processes.every(equalised(processes)),
            "bf16": lambda _: bf16_traffic(processes),
            "six": lambda name: run({**six(tree), "parallel": TENSOR}, processes, name),
            "run": lambda detail: run(tree, processes, detail),
            "groups_run": lambda detail: run(
                {**sparse(tree), "parallel": GROUPS["replicate"]}, processes, detail
            ),
            "spread_run": lambda detail: run(
                {**sparse(tree), "parallel": SPREAD}, processes, detail
            ),
            "twelve": lambda detail: run(twelve(tree), processes, detail),
            "weighted_run": lambda detail: run(weighted(tree), processes, detail),
            "mixed": lambda _: mixed(processes),
            "compiled": lambda way: compiled(
                processes, {"": MIXED, "flat": SPREAD, "hierarchical": LONG_WAY}[way]
            ),
            "mixed_run": lambda detail: run(mixed_run(tree), processes, detail),
            "muon_run": lambda detail: run(muon(tree), processes, detail),
            "tensor_run": lambda detail: run({**tree, "parallel": TENSOR}, processes, detail),
            "locmoe": lambda name: run(locmoe(tree), processes, name),
            "failures": lambda _: failures(tree, processes),
            "killed": lambda _: killed(tree, processes),
        }
        for case in cases:
            name, _, detail = case.partition(":")
            done[case] = actions[name](detail)
            if processes.is_main:
                (folder / "results.json").write_text(json.dumps(done))
