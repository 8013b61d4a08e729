"""Tells the job's sink what the trainer does, and stops the trainer when the job must stop."""

# ruff: noqa: ARG002 - transformers calls every hook with all of its arguments

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from shared.errors import JobFailure
from shared.events import Checkpoint, Control, Entry, EventSink, Progress
from shared.lifecycle import FailureCode, Phase
from worker.training.failures import DIVERGED_ADVICE


@dataclass(frozen=True)
class Evaluations:
    """When held-out rows are evaluated: after the last step, and every `steps` if that is given.

    With a `patience`, each evaluation that is the best so far gets a checkpoint, which stays whatever
    save_total_limit says, and training ends after so many evaluations without a new best.
    """

    steps: int | None
    patience: int | None


class JobCallback(TrainerCallback):  # type: ignore[misc]
    """Metrics, progress, checkpoints, evaluations and the stop request of one job.

    The trainer logs every step; `history` keeps a row for each, and the job's log gets an entry with the
    mean loss since the last one every `logging_steps` and at the end: `logged`. `evaluated` has the rows of
    the steps that were evaluated, `best` the one with the lowest loss.
    """

    def __init__(
        self,
        *,
        sink: EventSink,
        control: Control,
        total_steps: int,
        logging_steps: int,
        evaluations: Evaluations | None = None,
    ) -> None:
        self._sink = sink
        self._control = control
        self._total_steps = total_steps
        self._logging_steps = logging_steps
        self._evaluations = evaluations
        self._worse = 0
        self._losses: list[float] = []
        self._started = self._last = time.monotonic()
        self._first_step_end: float | None = None
        self._first_step_tokens = 0
        self.tokens = 0
        self.history: list[dict[str, float | int | None]] = []
        self.logged: list[dict[str, float | int | None]] = []
        self.evaluated: list[dict[str, float | int | None]] = []
        self.best: dict[str, float | int | None] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = self._last = time.monotonic()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._control.check()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._control.check()
        if self._evaluations is None:
            return
        every, step = self._evaluations.steps, state.global_step
        control.should_evaluate = step == self._total_steps or (every is not None and step % every == 0)

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
        if control.should_evaluate:
            self._sink.phase(Phase.EVALUATING)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        found = {name: round(value, 6) for name, value in metrics.items()}
        # A step has one row: whoever stores them replaces the one that came without the evaluation.
        row = {**self.history[-1], **found}
        self._stop_if_diverged(row, ("eval_loss",))
        self.history[-1] = row
        self._sink.metrics(row)
        step = int(row["step"] or 0)
        if self.logged and self.logged[-1]["step"] == step:
            self.logged[-1].update(found)
        evaluation: dict[str, float | int | None] = {"step": step, "epoch": row["epoch"], **found}
        self.evaluated.append(evaluation)
        best = self.best is None or found["eval_loss"] < float(self.best["eval_loss"] or 0)
        if best:
            self.best = evaluation
        text = (
            f"step {step}/{self._total_steps} eval loss {found['eval_loss']:.4f} "
            f"token accuracy {found['eval_mean_token_accuracy']:.4f}{' (best so far)' if best else ''}"
        )
        data = {**row, "total_steps": self._total_steps, "eta_seconds": self._eta_seconds(step)}
        self._sink.log(Entry(message=text, type="metrics", data=data))
        self._keep_or_stop(best, args, state, control)
        if step != self._total_steps and not control.should_training_stop:
            self._sink.phase(Phase.TRAINING)
        self._leave_out(time.monotonic() - self._last)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop:
            # Nothing rotates any more. Told of a best one, the trainer would now delete the last checkpoint,
            # which the sink was told of, where save_total_limit is 1.
            state.best_model_checkpoint = None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = checkpoint_folder(args.output_dir, state.global_step)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        loss = self.history[-1]["loss"] if self.history else None
        metrics = {"train_loss": float(loss)} if loss is not None else {}
        if self.evaluated and self.evaluated[-1]["step"] == state.global_step:
            metrics["eval_loss"] = float(self.evaluated[-1]["eval_loss"] or 0)
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

    def _keep_or_stop(self, best: bool, args: Any, state: Any, control: Any) -> None:
        patience = self._evaluations.patience if self._evaluations else None
        if patience is None:
            return
        if best:
            self._worse = 0
            control.should_save = True
            # The trainer's rotation of checkpoints leaves this one alone.
            state.best_model_checkpoint = str(checkpoint_folder(args.output_dir, state.global_step))
            return
        self._worse += 1
        if self._worse >= patience and state.global_step < self._total_steps:
            control.should_training_stop = True
            self._sink.log(
                Entry(
                    f"Stopping early at step {state.global_step} of {self._total_steps}: "
                    f"{self._worse} evaluation{'s' if self._worse > 1 else ''} without a lower loss than "
                    f"step {self.best['step'] if self.best else 0} had."
                )
            )

    def _leave_out(self, seconds: float) -> None:
        """Let these seconds count for neither speed nor time left."""
        self._last += seconds
        self._started += seconds
        if self._first_step_end is not None:
            self._first_step_end += seconds

    def _stop_if_diverged(
        self, row: dict[str, float | int | None], names: tuple[str, ...] = ("loss", "grad_norm")
    ) -> None:
        for name in names:
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


def checkpoint_folder(output: str | Path, step: int) -> Path:
    """Where the trainer puts a step's checkpoint."""
    return Path(output) / f"checkpoint-{step}"


def stop_between_layers(model: Any, control: Any) -> list[Any]:
    """Ask `control` before each decoder layer: on a CPU one micro-batch of long rows takes a minute.

    Returns:
        the hooks' handles, for removal.
    """

    def check(module: Any, inputs: Any) -> None:  # noqa: ARG001
        control.check()

    layers = [m for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
    return [layer.register_forward_pre_hook(check) for layer in layers]
