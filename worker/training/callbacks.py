"""Tells the job's sink what the trainer does, and stops the trainer when the job must stop."""

# ruff: noqa: ARG002 - transformers calls every hook with all of its arguments

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from shared.errors import JobFailure, JobStopped
from shared.events import Entry, EventSink, Progress, TrainingControl
from shared.lifecycle import FailureCode, Phase
from worker.training.engines.adapters import decoder_layers
from worker.training.failures import DIVERGED_ADVICE
from worker.training.speed import Speed

Row = dict[str, float | int | None]


@dataclass(frozen=True)
class Evaluations:
    """When held-out rows are evaluated: after the last step, and every `steps` if that is given.

    With a `patience`, each evaluation that is the best so far gets a checkpoint, which stays whatever
    save_total_limit says, and training ends after so many evaluations without a new best.
    """

    steps: int | None
    patience: int | None


class JobCallback(TrainerCallback):  # type: ignore[misc]
    """Metrics, progress, evaluations and the stop request of one job.

    The trainer logs every step; `history` keeps a row for each, and the job's log gets an entry with the
    mean loss since the last one every `logging_steps` and at the end: `logged`. `evaluated` has the rows of
    the steps that were evaluated, `best` the one with the lowest loss. `stopped` is whether training ended
    early, `evaluation_due` whether the last step's evaluation was put off to leave sooner.
    """

    def __init__(
        self,
        *,
        sink: EventSink,
        control: TrainingControl,
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
        self.speed = Speed()
        self.history: list[Row] = []
        self.logged: list[Row] = []
        self.evaluated: list[Row] = []
        self.best: Row | None = None
        self.stopped = False
        self.evaluation_due = False
        # Whether any of the job's processes wants it: all of them save together, or none does.
        self.agree: Callable[[bool], bool] = bool
        # Looks at the disk.
        self.watch: Callable[[], None] = lambda: None

    def to_json(self) -> dict[str, Any]:
        """Everything that a later attempt needs to go on from this step; `restore` takes it."""
        return {
            "history": self.history,
            "logged": self.logged,
            "evaluated": self.evaluated,
            "best": self.best,
            "stopped": self.stopped,
            "evaluation_due": self.evaluation_due,
            "worse": self._worse,
            "losses": self._losses,
            "tokens": self.speed.tokens,
            "seconds": self.speed.seconds(),
            "tokens_per_second": self.speed.mean(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, and tell its rows again: a kill may have lost the last of them."""
        self.history, self.logged = state["history"], state["logged"]
        self.evaluated, self.best = state["evaluated"], state["best"]
        self.stopped, self.evaluation_due = state["stopped"], state["evaluation_due"]
        self._worse, self._losses = state["worse"], state["losses"]
        self.speed.resume(state["tokens"], state["seconds"], state["tokens_per_second"])
        for row in self.history:
            self._sink.metrics(row)
        self._sink.progress(self._progress(self.history[-1]))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.speed.start()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.check_step()
        self.watch()
        due = False
        if self._evaluations is not None:
            every, step = self._evaluations.steps, state.global_step
            due = step == self._total_steps or (every is not None and step % every == 0)
        leaving = self.agree(self._control.leaving())
        self.evaluation_due = due and leaving
        control.should_evaluate = due and not leaving
        control.should_save = control.should_save or leaving

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        # The rows are in `history`: the trainer's own copy of them would be in each checkpoint too.
        state.log_history.clear()
        if "loss" not in logs:
            # The summary at the end of training.
            return
        rate = self.speed.end_step(int(logs["num_tokens"]))
        row: Row = {
            "step": state.global_step,
            "epoch": round(float(state.epoch), 6),
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "tokens_per_second": round(rate, 2),
            "mean_token_accuracy": round(float(logs["mean_token_accuracy"]), 6),
            "tokens": self.speed.tokens,
        }
        self._stop_if_diverged(row)
        self.history.append(row)
        self._sink.metrics(row)
        self._tell(row)
        if control.should_evaluate:
            self._sink.phase(Phase.EVALUATING)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        self.evaluation_due = False
        found = {name: round(value, 6) for name, value in metrics.items()}
        # A step has one row: whoever stores them replaces the one that came without the evaluation.
        row = {**self.history[-1], **found}
        self._stop_if_diverged(row, ("eval_loss",))
        self.history[-1] = row
        self._sink.metrics(row)
        step = int(row["step"] or 0)
        if self.logged and self.logged[-1]["step"] == step:
            self.logged[-1].update(found)
        evaluation: Row = {"step": step, "epoch": row["epoch"], **found}
        self.evaluated.append(evaluation)
        best = self.best is None or found["eval_loss"] < float(self.best["eval_loss"] or 0)
        if best:
            self.best = evaluation
        text = (
            f"step {step}/{self._total_steps} eval loss {found['eval_loss']:.4f} "
            f"token accuracy {found['eval_mean_token_accuracy']:.4f}{' (best so far)' if best else ''}"
        )
        data = {
            **row,
            "total_steps": self._total_steps,
            "eta_seconds": self.speed.eta(self._total_steps - step),
        }
        self._sink.log(Entry(message=text, type="metrics", data=data))
        self._keep_or_stop(best, step, control)
        if step != self._total_steps and not self.stopped:
            self._sink.phase(Phase.TRAINING)
        self.speed.leave_out()

    def put_off_evaluation(self) -> bool:
        """An evaluation was stopped: whether it was to leave, with a checkpoint, and is to be done later."""
        self.evaluation_due = self._control.leaving()
        return self.evaluation_due

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._control.leaving():
            raise JobStopped

    def checkpoint_metrics(self) -> dict[str, float]:
        """What is told of a checkpoint of the last step."""
        last = self.history[-1]
        metrics = {"train_loss": float(last["loss"] or 0)}
        if self.evaluated and self.evaluated[-1]["step"] == last["step"]:
            metrics["eval_loss"] = float(self.evaluated[-1]["eval_loss"] or 0)
        return metrics

    def kept_step(self) -> int | None:
        """The step whose checkpoint must stay: the best, with early stopping."""
        wanted = self._evaluations is not None and self._evaluations.patience is not None
        return int(self.best["step"] or 0) if wanted and self.best else None

    def check_step(self) -> None:
        """Whoever leaves with a checkpoint goes on to the step's end."""
        if not self._control.leaving():
            self._control.check()

    def _keep_or_stop(self, best: bool, step: int, control: Any) -> None:
        patience = self._evaluations.patience if self._evaluations else None
        if patience is None:
            return
        if best:
            self._worse = 0
            control.should_save = True
            return
        self._worse += 1
        if self._worse >= patience and step < self._total_steps:
            self.stopped = control.should_training_stop = True
            # So that an attempt that only has to export need not find out again.
            control.should_save = True
            self._sink.log(
                Entry(
                    f"Stopping early at step {step} of {self._total_steps}: "
                    f"{self._worse} evaluation{'s' if self._worse > 1 else ''} without a lower loss than "
                    f"step {self.best['step'] if self.best else 0} had."
                )
            )

    def _stop_if_diverged(self, row: Row, names: tuple[str, ...] = ("loss", "grad_norm")) -> None:
        for name in names:
            value = row[name]
            if value is not None and not math.isfinite(value):
                raise JobFailure(
                    FailureCode.DIVERGED,
                    f"Training diverged: the {name.replace('_', ' ')} was {value} at step {row['step']}.",
                    DIVERGED_ADVICE,
                )

    def _progress(self, row: Row) -> Progress:
        step = int(row["step"] or 0)
        return Progress(
            step=step,
            total_steps=self._total_steps,
            epoch=float(row["epoch"] or 0),
            loss=float(row["loss"] or 0),
            tokens_per_second=self.speed.mean(),
            eta_seconds=self.speed.eta(self._total_steps - step),
        )

    def _tell(self, row: Row) -> None:
        self._losses.append(float(row["loss"] or 0))
        progress = self._progress(row)
        step, eta = progress.step, progress.eta_seconds or 0
        self._sink.progress(progress)
        if step % self._logging_steps and step != self._total_steps:
            return
        mean_loss = round(sum(self._losses) / len(self._losses), 6)
        self._losses.clear()
        speed = self.speed.mean()
        logged = {**row, "loss": mean_loss, "tokens_per_second": speed}
        self.logged.append(logged)
        text = (
            f"step {step}/{self._total_steps} loss {mean_loss:.4f} lr {row['learning_rate']:.3g} "
            f"epoch {row['epoch']:.2f} grad norm {row['grad_norm']:.3f} "
            f"{speed or 0:.0f} tokens/s ETA {eta:.0f} s"
        )
        data = {**logged, "total_steps": self._total_steps, "eta_seconds": eta}
        self._sink.log(Entry(message=text, type="metrics", data=data))


def stop_between_layers(model: Any, control: TrainingControl) -> list[Any]:
    """Ask `control` before each decoder layer: on a CPU one micro-batch of long rows takes a minute.

    Whoever leaves with a checkpoint goes on to the end of a training step, though not of an evaluation.

    Returns:
        the hooks' handles, for removal.
    """

    def check(module: Any, inputs: Any) -> None:  # noqa: ARG001
        if not (module.training and control.leaving()):
            control.check()

    return [layer.register_forward_pre_hook(check) for layer in decoder_layers(model)]
