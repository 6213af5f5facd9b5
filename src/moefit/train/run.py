"""The state of one run: everything that steps change and a checkpoint must carry.

Owns the order of events within a run: resume, steps, log, evaluation, checkpoints, the way out.
Prints nothing; a `Watcher` is told.

Shapes: B sequences, L1 tokens a sequence plus the last target.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moefit.dsmoe.router_state import router_state
from moefit.errors import ConfigError, DivergenceError
from moefit.train import checkpoint
from moefit.train.batches import Batches, windows
from moefit.train.build import attention_implementation, build_model, loss_weights, use_bf16
from moefit.train.config import TrainConfig
from moefit.train.log import RunLog
from moefit.train.schedule import learning_rate, make_optimizer, set_learning_rate
from moefit.train.signals import StopRequest
from moefit.train.step import Stepper, make_losses
from moefit.train.throughput import measured_peak_flops, training_flops_per_token
from moefit.train.tokenizer import vocabulary_size
from moefit.train.tokens import PreparedData
from moefit.train.watcher import Watcher


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """Where a run ended: its last checkpoint, and the signal if one stopped it early."""

    step: int
    checkpoint: Path
    held_out_loss: float | None
    stopped_by: str | None


class Run:
    """The state of one run. Everything that a checkpoint must carry is saved by `_save`."""

    def __init__(self, config: TrainConfig, data: PreparedData, watcher: Watcher):
        self.config, self.data, self.watcher = config, data, watcher
        self.out = Path(config.out)
        self.device = _device(config.device)
        self.bf16 = use_bf16(config, self.device)
        eos = data.tokenizer.eos_token_id
        assert isinstance(eos, int)
        vocab_size = vocabulary_size(data.tokenizer)
        self.model = build_model(config, vocab_size=vocab_size, eos_token_id=eos)
        self.model.to(self.device)  # pyright: ignore[reportArgumentType]
        self.model.set_attn_implementation(attention_implementation(config, self.device))
        if config.activation_checkpointing:
            self.model.activation_checkpointing_enable()
        self.optimizer = make_optimizer(self.model, config.optimizer)
        weights = loss_weights(config, self.model)
        self.stepper = Stepper(
            model=self.model,
            optimizer=self.optimizer,
            losses=make_losses(self.model, weights, compile=config.compile),
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
        self.tokens_per_step = config.batch_size * config.accumulation * config.seq_len
        self.first_step = 0
        self.seconds_before = 0.0
        self.held_out_loss: float | None = None
        self.facts = self._facts()

    def _facts(self) -> dict[str, Any]:
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
            "flops_per_token": training_flops_per_token(self.model, self.config.seq_len),
            "peak_flops": measured_peak_flops(self.device, dtype),
        }

    def resume(self) -> None:
        """Take up the newest checkpoint, if there is one; every file of it is verified first."""
        found = checkpoint.checkpoints(self.out)
        if found:
            folder = found[-1]
            state = checkpoint.load_state(folder)
            saved = type(self.model).from_pretrained(folder, dtype=torch.float32)
            self.model.load_state_dict(saved.state_dict())
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
            self.first_step, self.seconds_before = state["step"], state["seconds"]
            self.watcher.event(f"resuming from {folder}")
        else:
            torch.manual_seed(self.config.seed)
        self.log = RunLog(
            self.out, resumed_step=self.first_step, tensorboard=self.config.log.tensorboard
        )

    def until_done(self, request: StopRequest) -> TrainResult:
        """All remaining steps; on a signal, the current one and a checkpoint."""
        self.model.train()
        start = time.perf_counter()
        saved: Path | None = None
        step = self.first_step
        for step in range(self.first_step + 1, self.config.steps + 1):
            began = time.perf_counter()
            values = self._step(step)
            values["tokens_per_second"] = self.tokens_per_step / (time.perf_counter() - began)
            values["mfu"] = (
                values["tokens_per_second"]
                * self.facts["flops_per_token"]
                / self.facts["peak_flops"]
            )
            seconds = self.seconds_before + time.perf_counter() - start
            self._tell(step, {**values, "seconds": seconds})
            saved = None
            last = step == self.config.steps or request.received is not None
            if last or step % self.config.checkpoint.every == 0:
                saved = self._save(step, seconds)
            if last:
                break
        if saved is None:
            saved = checkpoint.checkpoints(self.out)[-1]
        return TrainResult(
            step=step,
            checkpoint=saved,
            held_out_loss=self.held_out_loss,
            stopped_by=request.received.name if request.received else None,
        )

    def _step(self, step: int) -> dict[str, float]:
        rate = learning_rate(step - 1, self.config.steps, self.config.optimizer)
        set_learning_rate(self.optimizer, rate)
        count = self.config.accumulation
        micro_batches = (self.batches.batch((step - 1) * count + i) for i in range(count))
        try:
            result = self.stepper.step(micro_batches, count)
        except DivergenceError as error:
            raise DivergenceError(self._diverged(step, error)) from error
        values = {
            "loss": result.lm_loss,
            "router_loss": result.router_loss,
            "gradient_norm": result.gradient_norm,
            "lr": rate,
        }
        if step % self.config.log.every == 0 or step in (1, self.config.steps):
            for kind in ("mlp", "attention"):
                logits = result.mlp_logits if kind == "mlp" else result.attention_logits
                state = router_state(logits, self.config.log.epsilon)
                values |= {f"{kind}_{name}": value for name, value in state.items()}
        return values

    def _diverged(self, step: int, error: DivergenceError) -> str:
        kept = checkpoint.checkpoints(self.out)
        good = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was reached"
        return (
            f"training diverged at step {step}: {error}; {good}; try a lower optimizer.lr "
            f"(now {self.config.optimizer.lr:g}) or more optimizer.warmup_steps"
        )

    def _tell(self, step: int, values: dict[str, float]) -> None:
        config = self.config.log
        if step % config.every == 0 or step in (1, self.config.steps):
            self.log.write("train", step, values)
        if step % config.eval_every == 0 or step == self.config.steps:
            self.held_out_loss = self._evaluate()
            self.log.write("eval", step, {"loss": self.held_out_loss, "seconds": values["seconds"]})
        if self.held_out_loss is not None:
            values = {**values, "held_out_loss": self.held_out_loss}
        self.watcher.stepped(step, values)

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean held-out loss over at most `eval_tokens`, in eval mode (the inference rule)."""
        tokens, limit = self.data.held_out.open(), self.config.log.eval_tokens
        self.model.eval()
        total, count = 0.0, 0
        for window_L1 in windows(tokens, self.config.seq_len, limit):
            ids_BL1 = torch.from_numpy(window_L1.astype("int64"))[None].to(self.device)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                logits = self.model(input_ids=ids_BL1[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[0].float(), ids_BL1[0, 1:], reduction="sum"
            )
            total, count = total + loss.item(), count + ids_BL1.shape[1] - 1
        self.model.train()
        return total / count

    def _save(self, step: int, seconds: float) -> Path:
        state: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "seconds": seconds,
        }
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        snapshot = checkpoint.Snapshot(
            step=step, model=self.model, tokenizer=self.data.tokenizer, state=state
        )
        return checkpoint.save(self.out, snapshot, keep=self.config.checkpoint.keep)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cpu" or torch.cuda.is_available():
            return device
    raise ConfigError(f"device={name!r} is not to be had here; use auto or cpu")
