"""Tells the job's sink what the trainer does, and stops the trainer when the job must stop."""

# ruff: noqa: ARG002 - transformers calls every hook with all of its arguments

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from shared.errors import JobFailure
from shared.events import Checkpoint, Control, Entry, EventSink, Progress
from shared.lifecycle import FailureCode
from worker.training.failures import DIVERGED_ADVICE


class JobCallback(TrainerCallback):  # type: ignore[misc]
    """Metrics, progress, checkpoints and the stop request of one job.

    The trainer logs every step; `history` keeps a row for each, and the job's log gets an entry with the
    mean loss since the last one every `logging_steps` and at the end: `logged`.
    """

    def __init__(self, *, sink: EventSink, control: Control, total_steps: int, logging_steps: int) -> None:
        self._sink = sink
        self._control = control
        self._total_steps = total_steps
        self._logging_steps = logging_steps
        self._losses: list[float] = []
        self._started = self._last = time.monotonic()
        self._first_step_end: float | None = None
        self._first_step_tokens = 0
        self.tokens = 0
        self.history: list[dict[str, float | int | None]] = []
        self.logged: list[dict[str, float | int | None]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = self._last = time.monotonic()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._control.check()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._control.check()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "loss" not in logs:
            # The summary at the end of training.
            return
        now = time.monotonic()
        tokens, self.tokens = int(logs["num_tokens"]) - self.tokens, int(logs["num_tokens"])
        row: dict[str, float | int | None] = {
            "step": state.global_step,
            "epoch": round(float(state.epoch), 6),
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "tokens_per_second": round(tokens / max(now - self._last, 1e-9), 2),
            "mean_token_accuracy": round(float(logs["mean_token_accuracy"]), 6),
        }
        self._last = now
        if self._first_step_end is None:
            self._first_step_end, self._first_step_tokens = now, self.tokens
        self._stop_if_diverged(row)
        self.history.append(row)
        self._sink.metrics(row)
        self._tell(row)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        loss = self.history[-1]["loss"] if self.history else None
        metrics = {"train_loss": float(loss)} if loss is not None else {}
        self._sink.checkpoint(Checkpoint(step=state.global_step, path=path, bytes=size, metrics=metrics))

    def mean_tokens_per_second(self) -> float | None:
        """Over all steps but the first, which also warms things up; None before the first step ended."""
        if self._first_step_end is None:
            return None
        if self._last > self._first_step_end:
            rate = (self.tokens - self._first_step_tokens) / (self._last - self._first_step_end)
        else:
            rate = self.tokens / max(self._last - self._started, 1e-9)
        return round(rate, 2)

    def seconds(self) -> float:
        """From the start of training to the last step's end."""
        return self._last - self._started

    def _stop_if_diverged(self, row: dict[str, float | int | None]) -> None:
        for name in ("loss", "grad_norm"):
            value = row[name]
            if value is not None and not math.isfinite(value):
                raise JobFailure(
                    FailureCode.DIVERGED,
                    f"Training diverged: the {name.replace('_', ' ')} was {value} at step {row['step']}.",
                    DIVERGED_ADVICE,
                )

    def _tell(self, row: dict[str, float | int | None]) -> None:
        step, loss = int(row["step"] or 0), float(row["loss"] or 0)
        self._losses.append(loss)
        eta = self._eta_seconds(step)
        self._sink.progress(
            Progress(
                step=step,
                total_steps=self._total_steps,
                epoch=float(row["epoch"] or 0),
                loss=loss,
                tokens_per_second=self.mean_tokens_per_second(),
                eta_seconds=eta,
            )
        )
        if step % self._logging_steps and step != self._total_steps:
            return
        mean_loss = round(sum(self._losses) / len(self._losses), 6)
        self._losses.clear()
        speed = self.mean_tokens_per_second()
        logged = {**row, "loss": mean_loss, "tokens_per_second": speed}
        self.logged.append(logged)
        text = (
            f"step {step}/{self._total_steps} loss {mean_loss:.4f} lr {row['learning_rate']:.3g} "
            f"epoch {row['epoch']:.2f} grad norm {row['grad_norm']:.3f} "
            f"{speed or 0:.0f} tokens/s ETA {eta:.0f} s"
        )
        data = {**logged, "total_steps": self._total_steps, "eta_seconds": eta}
        self._sink.log(Entry(message=text, type="metrics", data=data))

    def _eta_seconds(self, step: int) -> float:
        left = self._total_steps - step
        if self._first_step_end is not None and step > 1:
            per_step = (self._last - self._first_step_end) / (step - 1)
        else:
            per_step = self._last - self._started
        return round(left * per_step, 1)


def stop_between_layers(model: Any, control: Any) -> list[Any]:
    """Ask `control` before each decoder layer: on a CPU one micro-batch of long rows takes a minute.

    Returns:
        the hooks' handles, for removal.
    """

    def check(module: Any, inputs: Any) -> None:  # noqa: ARG001
        control.check()

    layers = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    return [layer.register_forward_pre_hook(check) for layer in layers]
