"""TRL's SFTTrainer with Tuneyard's order of rows, counting and evaluation, and no model cards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import trl
from safetensors import SafetensorError
from torch.utils.data import Sampler

from shared.errors import JobStopped
from worker.training.collate import IGNORED
from worker.training.failures import is_full, out_of_disk
from worker.training.optimizer import AdamW8bit


class RowOrder(Sampler[int]):
    """The data's own order in the first epoch, another shuffle of its batches in each later one.

    The data comes shuffled, with its longest rows first: a job that will run out of memory does so in its
    first step rather than after an hour. Rows that are padded lie in batches of like lengths, which stay
    together; packed rows are shuffled one by one. A batch that isn't full stays the last. A batch is an
    effective one: how the plan splits it changes nothing in the order. Behind the `rows` come `fill` more
    that only fill up the last batches.
    """

    def __init__(self, rows: int, seed: int, batch: int = 1, fill: int = 0) -> None:
        self._rows = rows
        self._fill = fill
        self._batch = batch
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch, also after it resumed in the middle of one."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        everything = self._rows + self._fill
        if self._epoch == 0:
            return iter(range(everything))
        generator = torch.Generator().manual_seed(self._seed + self._epoch)
        full = self._rows // self._batch
        rows = torch.arange(full * self._batch).reshape(full, self._batch)
        shuffled = rows[torch.randperm(full, generator=generator)].flatten().tolist()
        return iter([*shuffled, *range(full * self._batch, everything)])

    def __len__(self) -> int:
        return self._rows + self._fill


def filled(rows: Any, batch: int, pad_token_id: int) -> tuple[Any, int]:
    """The rows, and behind them as many empty ones as make full batches for every process; and how many.

    Nothing is learnt from an empty row. Without them accelerate would train on the first rows once more.

    Args:
        batch: rows of all processes' micro-batches together.
    """
    import datasets

    fill = -len(rows) % batch
    if not fill:
        return rows, 0
    empty = {"input_ids": [pad_token_id] * 2, "labels": [IGNORED] * 2, "seq_lengths": [2]}
    more = datasets.Dataset.from_list([empty] * fill, features=rows.features)
    return datasets.concatenate_datasets([rows, more]), fill


def remember_mode(model: Any) -> None:
    """Let `model.train()` do nothing where the model is in that mode already.

    The trainer calls it in every micro-batch, and a model with adapters has thousands of modules to walk.
    """
    walk = model.train
    walk()

    def train(mode: bool = True) -> Any:
        return model if model.training == mode else walk(mode)

    model.train = train


class JobTrainer(trl.SFTTrainer):  # type: ignore[misc]
    """The trainer of every engine.

    Its collator gives `num_tokens` with each batch, its model `loss`, `num_correct_tokens` and
    `num_valid_tokens`. Checkpoints are written under `aside` and then given to `publish` with their step,
    where the disk `fits` one; what is `left_out` is told.
    `check` is asked in evaluations; one that it stops asks `put_off_evaluation` whether to go on.
    """

    control: Any
    aside: Path
    publish: Callable[[int], None]
    fits: Callable[[int], bool]
    left_out: Callable[[int], None]
    check: Callable[[], None]
    put_off_evaluation: Callable[[], bool]
    # How many of the rows, the last ones, only fill up batches.
    fill = 0
    # Whether a row may hold several documents.
    packed = True
    # Right and learnt tokens since the last log, and all tokens, on the device: reading them waits for it.
    counts: torch.Tensor | None = None
    tokens: torch.Tensor | None = None

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, Any]:
        found, arguments = trl.SFTTrainer.get_optimizer_cls_and_kwargs(args, model)
        return (AdamW8bit if found is bitsandbytes.optim.AdamW else found), arguments

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: ARG002 - transformers' signature
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """The mean loss over the learnt tokens of the whole step.

        TRL's own waits for the device four times in every micro-batch to log what this logs once a step.
        """
        tokens = inputs.pop("num_tokens")
        found = model(**inputs, num_items_in_batch=num_items_in_batch)
        counted = torch.stack([found.num_correct_tokens.float(), found.num_valid_tokens.float()]).detach()
        self.counts = counted if self.counts is None else self.counts + counted
        self.tokens = tokens if self.tokens is None else self.tokens + tokens
        # The count is of all processes, and gradients are averaged over them.
        loss: torch.Tensor = found.loss * self.accelerator.num_processes
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.counts is not None and self.tokens is not None:
            correct, valid = self.accelerator.reduce(self.counts, "sum").tolist()
            logs["mean_token_accuracy"] = correct / max(valid, 1)
            logs["num_tokens"] = int(self.accelerator.reduce(self.tokens, "sum"))
            self.counts = None
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:
        rows = train_dataset if train_dataset is not None else self.train_dataset
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        # By the rows, not by the collator: an engine may join single documents, and has the same order.
        batch = 1 if self.packed else step
        return RowOrder(len(rows) - self.fill, self.args.data_seed, batch, self.fill)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # noqa: ARG002 - transformers gives more
        """The held-out rows' mean loss and accuracy over all trained tokens, told to the callbacks.

        Transformers' own loop averages over batches, whatever their share of the tokens, and draws from the
        random numbers that dropout uses: an evaluation would change the training after it.
        """
        try:
            metrics = self._measure()
        except JobStopped:
            if not self.put_off_evaluation():
                raise
            self.control.should_save = True
            return {}
        finally:
            self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _measure(self) -> dict[str, float]:
        rows, size = self.eval_dataset, self.args.per_device_eval_batch_size
        processes = self.accelerator.num_processes
        sums = torch.zeros(3, dtype=torch.float64)
        self.model.eval()
        with torch.no_grad():
            for start in range(size * self.accelerator.process_index, len(rows), size * processes):
                self.check()
                batch = self.data_collator([rows[at] for at in range(start, min(start + size, len(rows)))])
                inputs = {n: tensor.to(self.args.device) for n, tensor in batch.items() if n != "num_tokens"}
                found = self.model(**inputs)
                valid = found.num_valid_tokens.item()
                if valid:
                    told = [found.loss.item() * valid, found.num_correct_tokens.item(), valid]
                    sums += torch.tensor(told, dtype=torch.float64)
        # The same figures on every process, so that all of them decide alike when to stop.
        loss, correct, tokens = self.accelerator.reduce(sums.to(self.args.device), "sum").tolist()
        return {"eval_loss": loss / tokens, "eval_mean_token_accuracy": correct / tokens}

    def any_process(self, flag: bool) -> bool:
        """Whether it is so on any of the job's processes; all of them have to ask."""
        if self.accelerator.num_processes == 1:
            return flag
        told = torch.tensor(float(flag), device=self.args.device)
        return bool(self.accelerator.reduce(told, "sum").item())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As transformers does on one GPU; the state moves to where the weights are in any case.

        On several processes it would read onto each one's device, and torch knows no `cpu:0`.
        """
        if checkpoint is None:
            return
        for file, part in (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler)):
            part.load_state_dict(torch.load(Path(checkpoint) / file, map_location="cpu", weights_only=True))

    def _get_output_dir(self, trial: Any) -> str:  # noqa: ARG002 - the trainer's signature
        return str(self.aside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Complete or absent: transformers writes its files one after the other into the final folder.

        Absent where the disk has no room: a job does not die of that.
        """
        step, first = self.state.global_step, self.args.should_save
        if self.any_process(first and not self.fits(step)):
            return
        written = self._wrote(lambda: super(JobTrainer, self)._save_checkpoint(model, trial))
        # Asking all of them waits for all of them, too.
        if not self.any_process(not written):
            written = not first or self._wrote(lambda: self.publish(step))
        if self.any_process(not written) and first:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.left_out(step)

    def _wrote(self, write: Callable[[], None]) -> bool:
        """Whether the disk took it.

        Raises:
            Exception: what was wrong was something else.
        """
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:
            if not (out_of_disk(error) or is_full(self.aside.parent)):
                raise
            return False
        return True

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the exports have Tuneyard's card."""
