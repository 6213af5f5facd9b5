"""Run training from the configuration to the last checkpoint.

`Trainer` steps, logs, evaluates, saves and stops on a signal. `train` locks the folder, prepares
the data, resumes from the newest checkpoint and draws the loss curve.
"""

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefit.device import parse_device
from moefit.dsmoe.losses import router_statistics
from moefit.errors import ConfigError, DivergenceError
from moefit.moe.expert_dropout import dropout_record
from moefit.moe.locality import locality_statistics
from moefit.signals import StopRequest, stop_on_signal
from moefit.train import checkpoint
from moefit.train.checkpoint import RunState
from moefit.train.config import TrainConfig
from moefit.train.data.batches import Batches
from moefit.train.data.tokenizer import vocabulary_size
from moefit.train.data.tokens import PreparedData, prepare
from moefit.train.display import TrainingCallback, draw_curve
from moefit.train.expert_dropout import (
    CALIBRATION_BATCHES,
    AllowedExperts,
    ExpertDropout,
    chosen_experts,
    first_experts,
    measured_order,
    set_held_out_loss,
    set_record,
)
from moefit.train.model import (
    attention_implementation,
    build_model,
    load_initial_weights,
    loss_weights,
    select_trainable,
    use_bf16,
)
from moefit.train.run_folder import (
    RunLog,
    check_same_config,
    last_record,
    locked,
    read_log,
    save_config,
)
from moefit.train.schedule import (
    is_sparse,
    learning_rate,
    make_optimizer,
    mi_scale,
    set_learning_rate,
)
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
    """

    def __init__(
        self, config: TrainConfig, out: Path, data: PreparedData, callback: TrainingCallback
    ):
        self.config, self.out, self.data, self.callback = config, out, data, callback
        self.device = parse_device(config.device)
        self.bf16 = use_bf16(config, self.device)
        self.model = self._build_model()
        self.dropout = ExpertDropout.of(config, self.model)
        self.allowed = AllowedExperts(self.model)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.stepper = Stepper(
            model=self.model,
            optimizer=self.optimizer,
            losses=make_losses(
                self.model,
                loss_weights(config, self.model),
                compile=config.compile,
                locality=config.loss.routing_locality,
                allowed=self.allowed,
                distill=self.dropout is not None and self.dropout.settings.self_distillation,
            ),
            device=self.device,
            bf16=self.bf16,
            clip=config.optimizer.clip,
        )
        self.batches = Batches(
            tokens=data.train.open(),
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        self.held_out = HeldOutEvaluator(
            tokens=data.held_out.open(),
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            limit=config.log.eval_tokens,
            bf16=self.bf16,
        )
        self.tokens_per_step = config.batch_size * config.accumulation * config.seq_len
        self.info = self._info()
        self.state = RunState(
            model=self.model,
            optimizer=self.optimizer,
            device=self.device,
            precision=self.info["precision"],
            fingerprint=data.fingerprint,
        )
        self.first_step, self.seconds_before = self._resume()
        self.log = RunLog(out, resumed_step=self.first_step, tensorboard=config.log.tensorboard)
        evaluated = last_record(read_log(out), "eval") or {"loss": None, "step": 0}
        self.held_out_loss: float | None = evaluated["loss"]
        self._evaluated_step: int = evaluated["step"]

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
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "train_tokens": self.data.train.tokens,
            "held_out_tokens": self.data.held_out.tokens,
            "tokens_per_step": self.tokens_per_step,
            "epochs": self.batches.epoch(self.config.steps * self.config.accumulation),
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "precision": "bf16" if self.bf16 else "fp32",
            "attention": attention_implementation(self.config, self.device),
            "flops_per_token": training_flops_per_token(self.model, self.config.seq_len),
            "peak_flops": measured_peak_flops(self.device, dtype),
        }

    def _resume(self) -> tuple[int, float]:
        """Restore the newest checkpoint, or seed; return step and seconds so far."""
        found = checkpoint.checkpoints(self.out)
        if found:
            resumed = self.state.restore(found[-1])
            self.callback.on_message(f"resuming from {found[-1]}")
            return resumed
        if self.config.continue_from is not None:
            return self._continue_from(Path(self.config.continue_from).expanduser())
        torch.manual_seed(self.config.seed)
        return 0, 0.0

    def _continue_from(self, folder: Path) -> tuple[int, float]:
        """Restore a checkpoint of another run, whose later steps this run computes its own way."""
        if not (folder / checkpoint.MANIFEST).is_file():
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
        if self.dropout is not None and self.dropout.begin_step < step:
            raise ConfigError(
                f"expert_dropout.begin={self.dropout.settings.begin:g} is step "
                f"{self.dropout.begin_step}, but continue_from={str(folder)!r} is at step {step}; "
                f"the least that works is {step / self.config.steps:g}"
            )
        self.callback.on_message(f"continuing from {folder}")
        return step, seconds

    def run(self, request: StopRequest) -> TrainResult:
        """Perform all remaining steps; on a signal, finish the current one and save."""
        self.model.train()
        steps, step, start = self.config.steps, self.first_step, time.perf_counter()
        seconds, stopping = self.seconds_before, False
        if step < steps:  # an evaluation that the previous process did not finish
            self._evaluate(step, seconds, lambda: request.received is not None)
        while step < steps and not stopping:
            step += 1
            values = self._timed_step(step)
            seconds = self.seconds_before + time.perf_counter() - start
            self._report(step, {**values, "seconds": seconds}, request)
            stopping = request.received is not None
            if stopping or step == steps or step % self.config.checkpoint.every == 0:
                self._save(step, seconds)
        if step == steps:  # skipped above if the signal came during the last step
            self._evaluate(step, seconds, lambda: False)
        return TrainResult(
            step=step,
            checkpoint=checkpoint.checkpoints(self.out)[-1],
            held_out_loss=self.held_out_loss,
            stopped_by=request.received.name if request.received and step < steps else None,
        )

    def _timed_step(self, step: int) -> dict[str, float]:
        began = time.perf_counter()
        values = self._step(step)
        speed = self.tokens_per_step / (time.perf_counter() - began)
        mfu = speed * self.info["flops_per_token"] / self.info["peak_flops"]
        return {**values, "tokens_per_second": speed, "mfu": mfu}

    def _step(self, step: int) -> dict[str, float]:
        rate = learning_rate(step - 1, self.config.steps, self.config.optimizer)
        set_learning_rate(self.optimizer, rate)
        scale = mi_scale(step, self.config.steps, self.config.loss.mi_ramp)
        sparse = self.config.sparse
        rule = sparse.rule if is_sparse(step, self.config.steps, sparse) else None
        count = self.config.accumulation
        micro_batches = (self.batches.batch((step - 1) * count + i) for i in range(count))
        allowed = self._allowed(step)
        try:
            result = self.stepper.step(
                micro_batches, count, mi_scale=scale, rule=rule, allowed=allowed
            )
        except DivergenceError as error:
            raise self._diverged(step, str(error)) from error
        finally:
            self.allowed.arguments(None)
        values = {
            "loss": result.lm_loss,
            "router_loss": result.router_loss,
            "gradient_norm": result.gradient_norm,
            "lr": rate,
        }
        return values | self._router_statistics(result) if self._is_logged(step) else values

    def _allowed(self, step: int) -> list[Tensor]:
        """Return which experts each sequence of the step may use, by micro-batch; [] is all."""
        if self.dropout is None or not self.dropout.active_at(step):
            return []
        count = self.config.accumulation
        numbers = range((step - 1) * count, step * count)
        if self.dropout.begins_at(step):
            ahead = range(numbers.start, numbers.start + CALIBRATION_BATCHES)
            order = measured_order(self.model, (self.batches.batch(i)[:, :-1] for i in ahead))
            set_record(self.model, self.dropout.record(order))
        record = dropout_record(self.model.config)
        assert record is not None, "set at the first such step, and restored by a checkpoint"
        sequences = self.config.batch_size
        return [self.dropout.draw(i, sequences, record.resident_order) for i in numbers]

    def _router_statistics(self, result: StepResult) -> dict[str, float]:
        kinds = {"mlp": result.mlp_logits, "attention": result.attention_logits}
        values = {
            f"{kind}_{name}": value
            for kind, logits in kinds.items()
            for name, value in router_statistics(logits, self.config.log.epsilon).items()
        }
        sequences = self.config.batch_size
        local = locality_statistics(result.mlp_logits, sequences, chosen_experts(self.model))
        return values | {f"mlp_{name}": value for name, value in local.items()}

    def _is_logged(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step in (1, self.config.steps)

    def _diverged(self, step: int, reason: str) -> DivergenceError:
        kept = checkpoint.checkpoints(self.out)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        where = f" with out=FOLDER (or after removing {self.out})" if kept else ""
        return DivergenceError(
            f"training diverged at step {step}: {reason}; {last}; try a lower optimizer.lr "
            f"(now {self.config.optimizer.lr:g}) or more optimizer.warmup_steps{where}"
        )

    def _report(self, step: int, values: dict[str, float], request: StopRequest) -> None:
        if self._is_logged(step):
            self.log.write("train", step, values)
        self._evaluate(step, values["seconds"], lambda: request.received is not None)
        if self.held_out_loss is not None:
            values = {**values, "held_out_loss": self.held_out_loss}
        self.callback.on_step(step, values)

    def _evaluate(self, step: int, seconds: float, stop: Callable[[], bool]) -> None:
        """Evaluate if due at this step and not yet done; abandoned when `stop` returns True."""
        due = step > 0 and (step % self.config.log.eval_every == 0 or step == self.config.steps)
        if not due or self._evaluated_step == step:
            return
        loss = self.held_out.loss(self.model, stop)
        if loss is None:
            return
        few = self._loss_with_few(self.dropout.third, stop) if self.dropout else None
        if self.dropout and few is None:
            return
        self.held_out_loss, self._evaluated_step = loss, step
        third = {} if few is None else {"loss_third": few}
        self.log.write("eval", step, {"loss": loss, **third, "seconds": seconds})

    def _loss_with_few(self, experts: int, stop: Callable[[], bool]) -> float | None:
        """Return the held-out loss if each layer may use only its first experts.

        First in the resident order; if there is none, the most important ones of the last batches.
        """
        assert self.dropout is not None
        record = dropout_record(self.model.config)
        order = () if record is None else record.resident_order
        if not order:
            batches = (self.batches.batch(i)[:, :-1] for i in range(CALIBRATION_BATCHES))
            order = measured_order(self.model, batches)
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
        losses = {
            count: self._loss_with_few(count, lambda: False) for count in self.dropout.counts()
        }
        set_held_out_loss(self.model, {c: loss for c, loss in losses.items() if loss is not None})

    def _save(self, step: int, seconds: float) -> None:
        """Save a checkpoint, unless the last update made a weight infinite or NaN."""
        finite = [(name, p.isfinite().all()) for name, p in self.model.named_parameters()]
        if not torch.stack([one for _, one in finite]).all():
            name = next(name for name, one in finite if not one)
            raise self._diverged(step, f"{name} contains values that are not finite")
        if step == self.config.steps:
            self._record_costs()
        snapshot = checkpoint.Snapshot(
            step=step,
            model=self.model,
            tokenizer=self.data.tokenizer,
            state=self.state.state_dict(seconds),
        )
        checkpoint.save(self.out, snapshot, keep=self.config.checkpoint.keep)


CURVE = "curve.png"


def train(config: TrainConfig, callback: TrainingCallback) -> TrainResult:
    """Train, or resume training, as configured.

    Args:
        config: The run's configuration.
        callback: Receives progress.

    Raises:
        ConfigError: The configuration contradicts itself or the run in its folder.
        DataError: The text cannot be read, is too short, or has changed.
        CheckpointError: A checkpoint is damaged or cannot be written.
        DivergenceError: A loss, gradient or weight is not finite.
    """
    out = Path(config.out).expanduser()
    with locked(out):
        check_same_config(out, config)
        finished = _finished_result(out, config.steps)
        result = finished or _train(out, config, callback)
        curve = out / CURVE
        if result.step == config.steps and not (finished is not None and curve.is_file()):
            try:
                draw_curve(read_log(out), curve)
            except OSError as error:  # does not fail the run
                callback.on_message(
                    f"the run is finished, but {curve} could not be drawn: "
                    f"{error.strerror or error}; free disk space, then run the same command again"
                )
        return result


def _finished_result(out: Path, steps: int) -> TrainResult | None:
    """Return the result of a run that is complete; None if anything remains to be done."""
    found = checkpoint.checkpoints(out)
    if not found or checkpoint.step_of(found[-1]) != steps:
        return None
    evaluated = last_record(read_log(out), "eval")
    if evaluated is None or evaluated["step"] != steps:
        return None  # the process ended before its last evaluation
    checkpoint.verify(found[-1])
    return TrainResult(
        step=steps, checkpoint=found[-1], held_out_loss=evaluated["loss"], stopped_by=None
    )


def _train(out: Path, config: TrainConfig, callback: TrainingCallback) -> TrainResult:
    data = prepare(config.data, seq_len=config.seq_len, progress=callback.on_prepare)
    trainer = Trainer(config, out, data, callback)
    with closing(trainer.log):
        save_config(out, config)  # after validation, so that an invalid one is never stored
        trainer.log.write("run", trainer.first_step, trainer.info)
        callback.on_start(step=trainer.first_step, steps=config.steps, info=trainer.info)
        with stop_on_signal() as request:
            return trainer.run(request)
