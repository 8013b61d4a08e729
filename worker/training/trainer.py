"""The training loop: TRL's SFTTrainer over rows that are already tokenised, masked and packed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import JobStopped
from shared.events import Entry, EventSink, TrainingControl
from shared.lifecycle import Phase
from shared.plan import Plan
from shared.spec import JobSpec
from worker.checkpoints import checkpoint_folder, complete_checkpoints
from worker.training.checkpoints import Checkpoints, Identity, Restored
from worker.training.engines import engine_of

if TYPE_CHECKING:
    from worker.training.data import PreparedData
    from worker.training.room import Room


@dataclass(frozen=True)
class TrainingResult:
    """What the loop did.

    `history` has one row a step as `EventSink.metrics` got it, `logged` those that went to the job's log,
    with the mean loss since the one before, `evaluated` those of the evaluations. `best_step` is the one with
    the lowest `eval_loss`, None if nothing was evaluated; `exported_step` is the one that the model now has:
    the best with early stopping, else the last. `used` is what really ran, read back from the
    model and the device: attention implementation, dtype, packing, peak memory in bytes, tokens per second.
    """

    steps: int
    exported_step: int
    history: list[dict[str, float | int | None]]
    logged: list[dict[str, float | int | None]]
    evaluated: list[dict[str, float | int | None]] = field(default_factory=list)
    best_step: int | None = None
    used: dict[str, Any] = field(default_factory=dict)


def train(
    spec: JobSpec,
    plan: Plan,
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    output: Path,
    sink: EventSink,
    control: TrainingControl,
    revision: str | None = None,
    room: Room | None = None,
) -> TrainingResult:
    """Train the adapter of `model` in place, from the newest checkpoint that fits where there is one.

    Args:
        model: a `peft.PeftModel` on the plan's device, as the plan's engine made it.
        data: rows of `input_ids`, `labels` (-100 where nothing is learnt) and `seq_lengths`; those held out
            are evaluated.
        output: where checkpoints go, as `checkpoint-STEP` folders, and where those of earlier attempts are.
        revision: the model's; a checkpoint that was made with another is not used.
        room: what is left on the disk; without it there is always enough.

    Raises:
        JobFailure: `diverged`: the loss or the gradient is no longer a finite number.
        JobStopped: `control` said so, at the latest one layer of one micro-batch later; where `control` is
            leaving, after the checkpoint at the end of the step.
    """
    import torch

    from worker.training.callbacks import Evaluations, JobCallback, stop_between_layers

    steps = total_steps(spec, plan, len(data.train))
    training = spec.training
    held_out = data.validation
    callback = JobCallback(
        sink=sink,
        control=control,
        total_steps=steps,
        logging_steps=training.logging_steps,
        evaluations=Evaluations(training.eval_steps, training.early_stopping_patience) if held_out else None,
    )
    trainer = make_trainer(spec, plan, model, tokenizer, data, steps, output, [callback])
    _announce(spec, plan, model, steps, len(data.train), sink)
    identity = Identity.of(spec, plan, data.sha256, len(data.train), revision, steps)
    checkpoints = Checkpoints(output, identity, training.save_total_limit, sink)
    restored = checkpoints.newest()
    memory_before = restored.state["peak_memory_bytes"] if restored else 0

    def publish(step: int) -> None:
        state = callback.to_json() | {"peak_memory_bytes": max(memory_before, peak_memory_bytes(plan))}
        sink.checkpoint(checkpoints.publish(step, state, callback.checkpoint_metrics(), callback.kept_step()))

    trainer.aside, trainer.publish = checkpoints.aside, publish
    trainer.fits, trainer.left_out = (lambda _step: True), (lambda _step: None)
    if room is not None:
        trainer.fits = lambda step: room.fits_checkpoint(step, callback.kept_step())
        trainer.left_out, callback.watch = room.left_out, room.watch
    # One process of several can't leave an evaluation by itself: the others would wait for its share.
    alone = plan.gpus == 1
    trainer.check = control.check if alone else callback.check_step
    trainer.put_off_evaluation, callback.agree = callback.put_off_evaluation, trainer.any_process
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if trainer.accelerator.process_index > 0:
        # The adapters started alike on every GPU; dropout draws for other rows.
        torch.manual_seed(training.seed + trainer.accelerator.process_index)
    # A GPU is through with a micro-batch before anybody grows impatient, and hooks break compiled layers.
    hooks = stop_between_layers(model, control) if alone and plan.device == "cpu" else []
    try:
        if restored is None:
            trainer.train()
        else:
            _go_on(trainer, callback, restored, steps, sink)
    finally:
        for hook in hooks:
            hook.remove()
    return _result(spec, plan, trainer, callback, output, memory_before, sink)


def _go_on(trainer: Any, callback: Any, restored: Restored, steps: int, sink: EventSink) -> None:
    """Train from a checkpoint to the end, as if nothing had happened in between.

    The trainer itself restores adapter, optimiser, scheduler and random numbers, and skips the rows that the
    steps before have had.
    """
    step, folder = restored.checkpoint.step, restored.checkpoint.path
    callback.restore(restored.state)
    sink.log(Entry(f"Resumed from step {step} of {steps}.", data={"step": step}))
    # For what may follow without any training: the evaluation that is due, and the exports.
    _load_adapter(trainer.model, folder)
    trainer.state.global_step = step
    if callback.evaluation_due:
        sink.phase(Phase.EVALUATING)
        trainer.evaluate()
        if callback.evaluation_due:
            raise JobStopped
        sink.checkpoint(replace(restored.checkpoint, metrics=callback.checkpoint_metrics()))
    if step < steps and not callback.stopped:
        trainer.train(resume_from_checkpoint=str(folder))


def _result(
    spec: JobSpec, plan: Plan, trainer: Any, callback: Any, output: Path, memory_before: int, sink: EventSink
) -> TrainingResult:
    """What the loop did; the model gets the adapter that is to be exported."""
    last = int(callback.history[-1]["step"] or 0)
    best = int(callback.best["step"] or 0) if callback.best else None
    exported = last
    if best is not None and spec.training.early_stopping_patience is not None:
        exported = _best_kept(callback.evaluated, output, last)
        if exported != last:
            _load_adapter(trainer.model, checkpoint_folder(output, exported))
    if best is not None:
        which = "the last" if exported == last else "the best that was kept"
        why = "the lowest eval loss" if exported == best else f"{which}; step {best} had the lowest eval loss"
        sink.log(Entry(message=f"Exporting the adapter of step {exported}: {why}."))
    used = _what_ran(plan, trainer, callback, memory_before)
    for shortfall in engine_of(plan).shortfalls(used):
        sink.log(Entry(shortfall, level="warning", data={"used": used}))
    return TrainingResult(
        steps=last,
        exported_step=exported,
        history=callback.history,
        logged=callback.logged,
        evaluated=callback.evaluated,
        best_step=best,
        used=used,
    )


def _best_kept(evaluated: list[dict[str, Any]], output: Path, last: int) -> int:
    """The step with the lowest eval loss of those with an adapter: a full disk may have left some out."""
    there = {last, *complete_checkpoints(output)}
    kept = [row for row in evaluated if row["step"] in there]
    return int(min(kept, key=lambda row: float(row["eval_loss"]))["step"]) if kept else last


def make_trainer(
    spec: JobSpec,
    plan: Plan,
    model: Any,
    tokenizer: Any,
    data: PreparedData,
    steps: int,
    output: Path,
    callbacks: list[Any],
) -> Any:
    """The `JobTrainer` with the batches and the loss of the plan's engine."""
    import transformers

    from worker.training.collate import FlatCollator, PaddedCollator
    from worker.training.job_trainer import JobTrainer, filled, remember_mode

    rows, fill = data.train, 0
    if plan.gpus > 1:
        rows, fill = filled(rows, plan.micro_batch * plan.gpus, tokenizer.pad_token_id)
    trainer = JobTrainer(
        model=model,
        args=sft_config(spec, plan, steps, output),
        # As arrays: lists of numbers take a GPU's time to turn into tensors.
        train_dataset=rows.with_format("numpy"),
        eval_dataset=data.validation and data.validation.with_format("numpy"),
        processing_class=tokenizer,
        data_collator=(FlatCollator if spec.packing else PaddedCollator)(tokenizer.pad_token_id),
        callbacks=callbacks,
    )
    trainer.fill, trainer.packed = fill, spec.packing
    remember_mode(trainer.model)
    # It prints each log line to stdout, which belongs to whoever runs the job.
    trainer.remove_callback(transformers.PrinterCallback)
    engine_of(plan).wire(trainer, spec, plan)
    return trainer


def total_steps(spec: JobSpec, plan: Plan, rows: int) -> int:
    """Optimiser steps of the whole job.

    An epoch's last step takes the rows that are left, however few. With a fractional number of epochs the
    total is rounded up.
    """
    if spec.training.max_steps is not None:
        return spec.training.max_steps
    micro_batches = math.ceil(rows / (plan.micro_batch * plan.gpus))
    steps_per_epoch = math.ceil(micro_batches / plan.accumulation)
    return math.ceil(steps_per_epoch * spec.training.num_train_epochs)


def sft_config(spec: JobSpec, plan: Plan, steps: int, output: Path) -> Any:
    """The `trl.SFTConfig` of this job."""
    import trl

    training = spec.training
    return trl.SFTConfig(
        output_dir=str(output),
        per_device_train_batch_size=plan.micro_batch,
        # What fits with gradients fits without.
        per_device_eval_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=training.lr_scheduler_type,
        # Rounded down: the rate of the first warm-up step is zero, and a job of ten steps has none to waste.
        warmup_steps=int(training.warmup_ratio * steps),
        weight_decay=training.weight_decay,
        optim=training.optim,
        seed=training.seed,
        data_seed=training.seed,
        # Every step is logged, so that every step has its metrics row and a loss that is no number stops the
        # job at once; the job's log gets one entry per `logging_steps` of the spec.
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=training.save_steps,
        save_total_limit=training.save_total_limit,
        report_to="none",
        disable_tqdm=True,
        # The compiled engine casts by itself, in its graphs.
        bf16=plan.precision == "bf16" and plan.engine != "compiled",
        fp16=False,
        tf32=None,
        use_cpu=plan.device == "cpu",
        # Set up by the engine, layer by layer.
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        # The rows are packed already, and the collator of `make_trainer` keeps their documents apart.
        packing=False,
        padding_free=False,
        max_length=None,
        dataloader_num_workers=0,
        # With several GPUs: each step uses all trainable weights, and frozen ones are everywhere alike.
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=plan.device == "cuda",
        accelerator_config={"non_blocking": plan.device == "cuda"},
        # The head's logits are computed for the tokens that count only, a chunk at a time.
        loss_type="chunked_nll",
    )


def _announce(spec: JobSpec, plan: Plan, model: Any, steps: int, rows: int, sink: EventSink) -> None:
    trainable, frozen = _count_parameters(model)
    sink.log(
        Entry(
            message=f"Training {trainable:,} of {trainable + frozen:,} weights for {steps:,} steps over "
            f"{rows:,} rows of up to {spec.max_seq_length:,} tokens, "
            f"{plan.micro_batch} x {plan.accumulation} rows a step"
            f"{f' on each of {plan.gpus} GPUs' if plan.gpus > 1 else ''}.",
            data={"trainable_parameters": trainable, "total_steps": steps, "rows": rows},
        )
    )


def _load_adapter(model: Any, folder: Path) -> None:
    """Put a checkpoint's adapter in the place of the one that was trained last."""
    import peft

    weights = peft.load_peft_weights(str(folder), device="cpu")
    peft.set_peft_model_state_dict(model, weights)


def _count_parameters(model: Any) -> tuple[int, int]:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return trainable, frozen


def _what_ran(plan: Plan, trainer: Any, callback: Any, memory_before: int) -> dict[str, Any]:
    from worker.training.collate import FlatCollator

    base = trainer.model.get_base_model()
    frozen = next(p for p in base.parameters() if not p.requires_grad)
    return {
        "engine": plan.engine,
        "gpus": plan.gpus,
        "device": str(frozen.device),
        "dtype": str(frozen.dtype).removeprefix("torch."),
        "packing": trainer.packed and isinstance(trainer.data_collator, FlatCollator),
        **engine_of(plan).read_back(trainer),
        "peak_memory_bytes": max(memory_before, peak_memory_bytes(plan)),
        "tokens": callback.speed.tokens,
        "tokens_per_second": callback.speed.mean(),
        "training_seconds": round(callback.speed.seconds(), 3),
    }


def peak_memory_bytes(plan: Plan) -> int:
    """The most memory that training took: reserved by torch on a GPU, resident in the process on a CPU."""
    if plan.device == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved())
    import resource

    # Linux gives kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
