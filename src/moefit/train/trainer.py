"""The training loop: steps, log, evaluation, checkpoints, and stopping on a signal.

With many processes, all take the same decisions at the same step; the main one writes files.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moefit.device import parse_device
from moefit.dsmoe.losses import router_statistics
from moefit.errors import ConfigError, DivergenceError
from moefit.host import peak_process_bytes
from moefit.moe.expert_dropout import dropout_record
from moefit.moe.locality import locality_statistics
from moefit.signals import StopRequest
from moefit.train import checkpoint
from moefit.train.balancing import BalancingBias
from moefit.train.config import TrainConfig
from moefit.train.data.batches import training_batches, use_of_sources
from moefit.train.data.tokenizer import vocabulary_size
from moefit.train.data.tokens import PreparedData
from moefit.train.display import TrainingCallback
from moefit.train.memory.budget_aware import BudgetAware
from moefit.train.memory.early_routers import fit_early_routers
from moefit.train.memory.expert_dropout import (
    CALIBRATION_BATCHES,
    AllowedExperts,
    ExpertDropout,
    chosen_experts,
    first_experts,
    measured_order,
    set_held_out_loss,
    set_record,
)
from moefit.train.memory.pregated import GateTeacher
from moefit.train.memory.rounding import Rounding
from moefit.train.model import (
    attention_implementation,
    build_model,
    load_initial_weights,
    loss_weights,
    select_trainable,
    use_bf16,
)
from moefit.train.optimizer import make_optimizer
from moefit.train.parallel.locality import NodeLocality
from moefit.train.parallel.parallelism import check_model, parallelism
from moefit.train.parallel.processes import OneProcess, Processes, local_device
from moefit.train.parallel.saver import ShardedSaver, WholeSaver
from moefit.train.parallel.state import MIXED, RunState, seed_process
from moefit.train.run_folder import NoLog, RunLog, StepProfiler, last_record, read_log
from moefit.train.schedule import is_sparse, learning_rate, mi_scale, set_learning_rate
from moefit.train.spikes import SpikeDetector
from moefit.train.step import HeldOutEvaluator, Stepper, StepResult, make_losses
from moefit.train.throughput import measured_peak_flops, training_flops_per_token


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """The last checkpoint of a run, and the signal that stopped it early, if any."""

    step: int
    checkpoint: Path
    held_out_loss: float | None
    stopped_by: str | None


class Trainer:
    """Trains a model, starting from the newest checkpoint if there is one.

    Args:
        config: The run's configuration.
        out: Its folder.
        data: Tokens and tokenizer.
        callback: Receives progress.
        processes: That train together.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        data: PreparedData,
        callback: TrainingCallback,
        processes: Processes | None = None,
    ):
        self.config, self.out, self.data, self.callback = config, out, data, callback
        self.processes = processes or OneProcess()
        self.device = self.processes.agreed(self._device)
        self.bf16 = use_bf16(config, self.device)
        self.parallel = parallelism(config, self.processes, self.device)
        self.model = self.processes.agreed(self._build_model)
        self.processes.agreed(self._check_model)
        self.teacher = GateTeacher.of(config, self.model)  # copies whole routers
        resumes = self.processes.on_main(lambda: bool(checkpoint.checkpoints(out)))
        if not resumes:
            self._say(self.processes.agreed(lambda: fit_early_routers(config, self.model, data)))
        self.parallel.wrap(self.model)
        self.nodes = NodeLocality.of(config, self.model, self.parallel)
        self.balancing = BalancingBias.of(config, self.model)
        self.dropout = ExpertDropout.of(config, self.model)
        self.budget = BudgetAware.of(config, self.model)
        self.rounding = Rounding.of(config, self.model, self.processes.size)
        self.allowed = AllowedExperts(self.model)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.spikes = SpikeDetector(config.optimizer.skip_sigma)
        end = data.tokenizer.eos_token_id
        assert isinstance(end, int)
        self.document_end = end if config.data.document_mask else None
        self.stepper = self._stepper()
        self.batches = training_batches(config, data)
        self.held_out = HeldOutEvaluator(
            tokens=data.held_out.open(),
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            limit=config.log.eval_tokens,
            bf16=self.bf16,
            parallel=self.parallel,
            document_end=self.document_end,
        )
        self.profiler = StepProfiler(
            out, config.log.profile, rank=self.processes.rank, device=self.device
        )
        self.tokens_per_step = config.batch_size * config.accumulation * config.seq_len
        self._steps_timed = 0
        self.info = self._info()
        self.state = self._run_state()
        saver = WholeSaver if self.processes.size == 1 else ShardedSaver
        self.saver = saver(out, self.state, data.tokenizer, config.checkpoint.keep)
        self.first_step, self.seconds_before = self._resume()
        self.log = self.processes.agreed(self._open_log)
        evaluated = self.processes.on_main(lambda: last_record(read_log(out), "eval"))
        evaluated = evaluated or {"loss": None, "step": 0}
        self.held_out_loss: float | None = evaluated["loss"]
        self._evaluated_step: int = evaluated["step"]

    def _stepper(self) -> Stepper:
        return Stepper(
            model=self.model,
            optimizer=self.optimizer,
            losses=make_losses(
                self.model,
                loss_weights(self.config, self.model),
                compile=self.config.compile,
                locality=self.config.loss.routing_locality,
                budget=self.budget,
                teacher=self.teacher,
                allowed=self.allowed,
                distill=0.0 if self.dropout is None else self.dropout.distillation_weight,
                total=self.parallel.total,
                nodes=self.nodes,
                document_end=self.document_end,
            ),
            device=self.device,
            bf16=self.bf16,
            clip=self.config.optimizer.clip,
            parallel=self.parallel,
            is_spike=self.spikes.is_spike,
        )

    def _run_state(self) -> RunState:
        return RunState(
            model=self.model,
            optimizer=self.optimizer,
            device=self.device,
            precision=self.info["precision"],
            fingerprint=self.data.fingerprint,
            seed=self.config.seed,
            shards=len(self.data.shards) or 1,
            processes=self.processes,
            stream=self.parallel.mine,
            streams=self.parallel.shares,
            spikes=self.spikes,
        )

    def _check_model(self) -> None:
        """Raise ConfigError for a setting without effect, or a model that cannot be spread."""
        if self.config.trainable == "low_rank" and self.processes.size > 1:
            raise ConfigError(
                "trainable=low_rank changes whole experts, which many processes hold in parts; "
                "train with one process, or give trainable=all"
            )
        locality = self.config.loss.routing_locality
        if locality and int(self.model.config.num_experts) < 2:
            raise ConfigError(
                f"loss.routing_locality={locality:g} has no effect, because a model with "
                "model.num_experts=1 has no router; leave it out, or give model.num_experts=2 or "
                "more"
            )
        if self.config.data.shard_by != "none" and not self.data.shards:
            self.callback.on_message("one machine: data.shard_by has no effect")
        for line in check_model(self.config, self.model, self.processes.size):
            self.callback.on_message(line)

    def _device(self) -> torch.device:
        one = self.processes.size == 1
        return parse_device(self.config.device) if one else local_device(self.config.device)

    def _open_log(self) -> RunLog | NoLog:
        if not self.processes.is_main:
            return NoLog()
        return RunLog(
            self.out,
            resumed_step=self.first_step,
            tensorboard=self.config.log.tensorboard,
            wandb=self.config.model_dump(mode="json") if self.config.log.wandb else None,
        )

    def _build_model(self) -> PreTrainedModel:
        eos = self.data.tokenizer.eos_token_id
        assert isinstance(eos, int)
        vocab_size = vocabulary_size(self.data.tokenizer)
        model = build_model(self.config, vocab_size=vocab_size, eos_token_id=eos)
        if self.config.start_from is not None:
            load_initial_weights(model, self.config.start_from)
        select_trainable(model, self.config)
        model.to(self.device)  # pyright: ignore[reportArgumentType]
        model.set_attn_implementation(attention_implementation(self.config, self.device))
        if self.config.activation_checkpointing:
            model.activation_checkpointing_enable()
        return model

    def _info(self) -> dict[str, Any]:
        is_mixed = self.config.parallel.mixed_precision is not None
        dtype = torch.bfloat16 if self.bf16 or is_mixed else torch.float32
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "train_tokens": self.data.train.tokens,
            "held_out_tokens": self.data.held_out.tokens,
            "tokens_per_step": self.tokens_per_step,
            "epochs": self.batches.epoch(self.config.steps * self.config.accumulation),
            "sources": use_of_sources(self.config, self.data),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "precision": MIXED if is_mixed else "bf16" if self.bf16 else "fp32",
            "attention": attention_implementation(self.config, self.device),
            "flops_per_token": training_flops_per_token(self.model, self.config.seq_len),
            "peak_flops": self.processes.sums((measured_peak_flops(self.device, dtype),))[0],
            "processes": self.processes.size,
            "nodes": self.processes.nodes,
        }

    def _resume(self) -> tuple[int, float]:
        """Restore the newest checkpoint, or seed; return step and seconds so far."""
        found = self.processes.on_main(lambda: checkpoint.checkpoints(self.out))
        if found:
            resumed = self.state.restore(found[-1])
            self.callback.on_message(f"resuming from {found[-1]}")
            return resumed
        if self.config.continue_from is not None:
            return self._continue_from(Path(self.config.continue_from).expanduser())
        seed_process(self.config.seed, self.parallel.mine)
        return 0, 0.0

    def _continue_from(self, folder: Path) -> tuple[int, float]:
        """Restore a checkpoint of another run, whose later steps this run computes its own way."""
        if not self.processes.on_main((folder / checkpoint.MANIFEST).is_file):
            raise ConfigError(
                f"continue_from={str(folder)!r} is not a checkpoint; give one of a run's folders "
                "step-NUMBER"
            )
        step, seconds = self.state.restore(folder)
        if step >= self.config.steps:
            raise ConfigError(
                f"continue_from={str(folder)!r} is at step {step}, but steps={self.config.steps}; "
                f"the fewest that work are {step + 1}"
            )
        if (
            self.dropout is not None
            and self.dropout.begin_step < step
            and not self.dropout.made(dropout_record(self.model.config))
        ):
            raise ConfigError(
                f"expert_dropout.begin={self.dropout.settings.begin:g} is step "
                f"{self.dropout.begin_step}, but continue_from={str(folder)!r} is at step {step}; "
                f"the least that works is {step / self.config.steps:g}"
            )
        self.callback.on_message(f"continuing from {folder}")
        return step, seconds

    def run(self, request: StopRequest) -> TrainResult:
        """Perform all remaining steps; on a signal, finish the current one and save."""

        def stopped_by() -> int:
            return self.processes.most(int(request.received or 0))

        self.model.train()
        steps, step, start = self.config.steps, self.first_step, time.perf_counter()
        seconds, signal = self.seconds_before, 0
        if step < steps:  # an evaluation that the previous process did not finish
            self._evaluate(step, seconds, stopped_by)
        while step < steps and not signal:
            step += 1
            self.profiler.before(step)
            values = self._timed_step(step)
            self._say(self.profiler.after(step))
            seconds = self.seconds_before + time.perf_counter() - start
            self._report(step, {**values, "seconds": seconds}, stopped_by)
            signal = stopped_by()
            if signal or step == steps or step % self.config.checkpoint.every == 0:
                self._save(step, seconds)
        self._say(self.profiler.finish())  # a signal came within its steps
        self.saver.finish()
        if step == steps:  # skipped above if the signal came during the last step
            self._evaluate(step, seconds, lambda: 0)
        return TrainResult(
            step=step,
            checkpoint=self.processes.on_main(lambda: checkpoint.checkpoints(self.out)[-1]),
            held_out_loss=self.held_out_loss,
            stopped_by=Signals(signal).name if signal and step < steps else None,
        )

    def _say(self, message: str | None) -> None:
        if message is not None:
            self.callback.on_message(message)

    def _timed_step(self, step: int) -> dict[str, Any]:
        began = time.perf_counter()
        values = self._step(step)
        elapsed = time.perf_counter() - began
        speed = self.tokens_per_step / elapsed
        mfu = speed * self.info["flops_per_token"] / self.info["peak_flops"]
        values = {**values, "tokens_per_second": speed, "mfu": mfu}
        if self.processes.size > 1 and self._is_logged(step):
            values |= self._process_statistics(speed)
        return values

    def _process_statistics(self, speed: float) -> dict[str, Any]:
        """Return the mean seconds of communication per step since the last call, and so on."""
        size, steps = self.processes.size, max(1, self._steps_timed)
        self._steps_timed = 0
        peak = peak_process_bytes()
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_reserved(self.device)
        sent = {} if self.parallel.dispatch is None else self.parallel.dispatch.report(steps)
        peaks = self.processes.every(peak)
        return {
            **sent,
            "tokens_per_second_per_process": speed / size,
            "communication_seconds": self.processes.sums((self.parallel.clock.seconds(),))[0]
            / (size * steps),
            "largest_process_bytes": max(peaks),
            "process_bytes": peaks,
        }

    def _step(self, step: int) -> dict[str, float]:
        self._steps_timed += 1
        rate = learning_rate(step - 1, self.config.steps, self.config.optimizer)
        set_learning_rate(self.optimizer, rate)
        scale = mi_scale(step, self.config.steps, self.config.loss.mi_ramp)
        if self.nodes is not None:
            ramp = mi_scale(step, self.config.steps, self.config.loss.locality_ramp)
            self.nodes.weight.fill_(self.config.loss.locality * ramp)
        if self.budget is not None:
            self.budget.set_step(step)
        sparse = self.config.sparse
        rule = sparse.rule if is_sparse(step, self.config.steps, sparse) else None
        count = self.config.accumulation
        micro_batches = (self.batches.batch((step - 1) * count + i) for i in range(count))
        allowed = self._allowed(step)
        try:
            result = self.stepper.step(
                micro_batches,
                count,
                mi_scale=scale,
                rule=rule,
                allowed=allowed,
                weights=self.rounding.applied(self.model, step) if self.rounding else None,
            )
        except DivergenceError as error:
            raise self._diverged(step, str(error)) from error
        finally:
            self.allowed.arguments(None)
        if self.balancing is not None:
            self.balancing.update(self.processes)
        values = {
            "loss": result.lm_loss,
            "router_loss": result.router_loss,
            "gradient_norm": result.gradient_norm,
            "lr": rate,
        }
        if self.config.optimizer.skip_sigma is not None:
            values["skipped_steps"] = self.spikes.skipped
        return values | self._router_statistics(result) if self._is_logged(step) else values

    def _allowed(self, step: int) -> list[Tensor]:
        """Return which experts each sequence of the step may use, by micro-batch; [] is all."""
        if self.dropout is None or not self.dropout.active_at(step):
            return []
        count = self.config.accumulation
        numbers = range((step - 1) * count, step * count)
        if self.dropout.begins_at(step):
            ahead = range(numbers.start, numbers.start + CALIBRATION_BATCHES)
            order = self._measured_order(self.batches.batch(i) for i in ahead)
            set_record(self.model, self.dropout.record(order))
        record = dropout_record(self.model.config)
        assert record is not None, "set at the first such step, and restored by a checkpoint"
        sequences = self.config.batch_size
        return [self.dropout.draw(i, sequences, record.resident_order) for i in numbers]

    def _measured_order(self, batches: Iterable[Tensor]) -> list[list[int]]:
        """Return `measured_order` as process 0 finds it: others may round differently."""
        tokens = (ids_BN1[:, :-1] for ids_BN1 in batches)
        order = measured_order(self.model, tokens, self.document_end)
        return self.processes.every(order)[0]

    def _router_statistics(self, result: StepResult) -> dict[str, float]:
        mlp, attention = (
            [self.parallel.gather(layer.detach().flatten(0, -2)) for layer in logits]
            for logits in (result.mlp_logits, result.attention_logits)
        )
        kinds = {"mlp": mlp, "attention": attention}
        values = {
            f"{kind}_{name}": value
            for kind, logits in kinds.items()
            for name, value in router_statistics(logits, self.config.log.epsilon).items()
        }
        sequences = self.config.batch_size
        local = locality_statistics(mlp, sequences, chosen_experts(self.model))
        return values | {f"mlp_{name}": value for name, value in local.items()}

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step in (1, self.config.steps)

    def _diverged(self, step: int, reason: str) -> DivergenceError:
        self.saver.finish()
        self._write("diverged", step, {"reason": reason})
        kept = self.processes.on_main(lambda: checkpoint.checkpoints(self.out))
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        where = f" with out=FOLDER (or after removing {self.out})" if kept else ""
        return DivergenceError(
            f"training diverged at step {step}: {reason}; {last}; try a lower optimizer.lr "
            f"(now {self.config.optimizer.lr:g}) or more optimizer.warmup_steps{where}"
        )

    def _report(self, step: int, values: dict[str, Any], stop: Callable[[], int]) -> None:
        if self._is_logged(step):
            self._write("train", step, values)
        self._evaluate(step, values["seconds"], stop)
        if self.held_out_loss is not None:
            values = {**values, "held_out_loss": self.held_out_loss}
        self.callback.on_step(step, values)

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        self.processes.agreed(lambda: self.log.write(kind, step, values))

    def _evaluate(self, step: int, seconds: float, stop: Callable[[], int]) -> None:
        """Evaluate if due at this step and not yet done; abandoned when `stop` returns not 0."""
        due = step > 0 and (step % self.config.log.eval_every == 0 or step == self.config.steps)
        if not due or self._evaluated_step == step:
            return
        with self.parallel.clock.paused():
            loss = self.held_out.loss(self.model, stop)
            if loss is None:
                return
            few = self._loss_with_few(self.dropout.third, stop) if self.dropout else None
        if self.dropout and few is None:
            return
        self.held_out_loss, self._evaluated_step = loss, step
        third = {} if few is None else {"loss_third": few}
        self._write("eval", step, {"loss": loss, **third, "seconds": seconds})

    def _loss_with_few(self, experts: int, stop: Callable[[], int]) -> float | None:
        """Return the held-out loss if each layer may use only its first experts.

        First in the resident order; if there is none, the most important ones of the last batches.
        """
        assert self.dropout is not None
        record = dropout_record(self.model.config)
        order = () if record is None else record.resident_order
        if not order:
            order = self._measured_order(map(self.batches.batch, range(CALIBRATION_BATCHES)))
        allowed_LE = first_experts(order, experts, self.dropout.num_experts).to(self.device)

        def limit(sequences: int) -> dict[str, Any]:
            return self.allowed.arguments(allowed_LE[:, None].expand(-1, sequences, -1))

        try:
            return self.held_out.loss(self.model, stop, limit)
        finally:
            self.allowed.arguments(None)

    def _record_costs(self) -> None:
        """Add the held-out loss with fewer and fewer experts to what the checkpoint says."""
        if self.dropout is None:
            return
        losses = {count: self._loss_with_few(count, lambda: 0) for count in self.dropout.counts()}
        set_held_out_loss(self.model, {c: loss for c, loss in losses.items() if loss is not None})

    def _save(self, step: int, seconds: float) -> None:
        """Save a checkpoint, unless the last update made a weight infinite or NaN."""
        parts = ((n, _here(p)) for n, p in self.model.named_parameters())
        finite = [(name, part.isfinite().all()) for name, part in parts]
        bad = None
        if not torch.stack([one for _, one in finite]).all():
            bad = next(name for name, one in finite if not one)
        found = next((name for name in self.processes.every(bad) if name is not None), None)
        if found is not None:
            raise self._diverged(step, f"{found} contains values that are not finite")
        if step == self.config.steps:
            self._record_costs()
        self.saver.save(step, seconds)


def _here(parameter: Tensor) -> Tensor:
    """Return the part of a parameter that this process has."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
