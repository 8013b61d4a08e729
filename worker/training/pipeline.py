"""One job from its spec to its exports. A function of what it is given and of nothing hidden."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.errors import JobFailure
from shared.events import Artifact, Control, Entry, EventSink, TrainingControl
from shared.lifecycle import FailureCode, Phase
from shared.plan import Plan
from shared.spec import JobSpec
from worker.checkpoints import FOLDER as CHECKPOINTS
from worker.training.data import prepare_data
from worker.training.engines import engine_of
from worker.training.exports.adapter import export_adapter, save_adapter
from worker.training.exports.files import file_artifact
from worker.training.exports.make import Trained, make_exports, publish_modelfile
from worker.training.exports.manifest import Manifest, metrics_csv
from worker.training.exports.preflight import check_exports
from worker.training.library_log import library_messages
from worker.training.models import (
    ResolvedModel,
    fetch_weights,
    load_tokenizer,
    resolve_model,
    settle_tokenizer,
)
from worker.training.overlap import Loading
from worker.training.ranks import Ranks
from worker.training.room import Room
from worker.training.stack import import_stack
from worker.training.trainer import train
from worker.training.workdir import Workdir


def run(
    spec: JobSpec, plan: Plan, workdir: Workdir, sink: EventSink, control: TrainingControl
) -> list[Artifact]:
    """Prepare data -> load model -> train -> export.

    Each artifact is told to `sink.artifact` as soon as it is complete, so a later failure loses none.

    Returns:
        all artifacts, in the order in which they were told.

    Raises:
        JobFailure: with a code of the contract. Other exceptions may leave it too: `failures.explain` makes
            failures of them.
        ProcessLost: one of its processes on several GPUs is gone.
        JobStopped: `control` said so. No half-written artifact is left.
        NoRoomYet: before it trained: the disk has the room, and it is promised to others.
    """
    sink.phase(Phase.PREPARING_DATA)
    # Before anything else loads a library of it: Unsloth has to come first.
    import_stack(plan.engine)
    with (
        library_messages(sink),
        Ranks(plan, workdir, control) as ranks,
        Room(workdir, sink) as room,
    ):
        return _run(spec, plan, workdir, sink, ranks, room)


def _run(
    spec: JobSpec, plan: Plan, workdir: Workdir, sink: EventSink, control: Ranks, room: Room
) -> list[Artifact]:
    cap_gpu_memory(plan, workdir.gpu_memory_fraction)
    control.check()
    model = resolve_model(spec, workdir, control)
    check_length(spec, model)
    tokenizer = load_tokenizer(model)
    control.start(spec, model)
    # On a CPU both would want the same cores.
    loading = Loading(lambda: _load(spec, plan, model), control) if plan.device == "cuda" else None
    data = prepare_data(
        spec,
        workdir.dataset_file,
        tokenizer,
        sink,
        loading or control,
        model.context_length,
        cache=workdir.data_cache or workdir.cache / "data",
        cache_bytes=workdir.prepared_bytes,
        validation_file=workdir.validation_file,
    )
    settle_tokenizer(tokenizer, data.chat_template, data.stop_token)
    control.check()

    sink.phase(Phase.LOADING_MODEL)
    trained = loading.result() if loading else _load(spec, plan, model)
    check_exports(spec, model, tokenizer, workdir, control, room)
    sink.log(Entry(message=describe(model, plan, trained)))
    control.check()

    control.join(data)
    sink.phase(Phase.TRAINING)
    output = workdir.root / CHECKPOINTS
    result = train(spec, plan, trained, tokenizer, data, output, sink, control, model.revision, room)
    control.leave()

    sink.phase(Phase.EXPORTING)
    adapter = workdir.root / "adapter"
    save_adapter(trained, tokenizer, model.id, adapter)
    # The exports load the base model anew; this one's memory goes back first.
    del trained
    gc.collect()
    manifest = Manifest(
        spec=spec,
        plan=plan,
        model=model,
        chat_template=data.chat_template,
        stop_token=data.stop_token,
        data_sha256=data.sha256,
        data_report=data.report,
        training=result,
    )
    return _export(Trained(model, tokenizer, manifest, adapter), workdir.root, sink, control, room)


def cap_gpu_memory(plan: Plan, fraction: float) -> None:
    """Let torch take no more than this share of the GPU: it then fails as on a smaller one."""
    if plan.device == "cuda" and fraction < 1:
        import torch

        torch.cuda.set_per_process_memory_fraction(fraction)


def _load(spec: JobSpec, plan: Plan, model: ResolvedModel) -> Any:
    fetch_weights(model)
    return engine_of(plan).load_model(spec, plan, model)


def describe(model: ResolvedModel, plan: Plan, trained: Any) -> str:
    """What was loaded, for the job's log."""
    revision = f" at revision {model.revision}" if model.revision else ""
    base = trained.get_base_model()
    return (
        f"Loaded {model.id}{revision}: {type(base).__name__} in {plan.precision} on {plan.device}, "
        f"{base.config._attn_implementation} attention."
    )


def check_length(spec: JobSpec, model: ResolvedModel) -> None:
    """The rows must fit the model's context.

    Raises:
        JobFailure: `model_unavailable`.
    """
    if model.context_length is not None and spec.max_seq_length > model.context_length:
        raise JobFailure(
            FailureCode.MODEL_UNAVAILABLE,
            f"max_seq_length is {spec.max_seq_length}, and {spec.model} reads at most "
            f"{model.context_length} tokens.",
            f"Set max_seq_length to {model.context_length} or less.",
        )


def _export(trained: Trained, root: Path, sink: EventSink, control: Control, room: Room) -> list[Artifact]:
    """The record of the run first, then what was asked for."""
    target = root / "exports"
    target.mkdir(parents=True, exist_ok=True)
    manifest = trained.manifest
    made: list[Artifact] = []
    for name, kind, text in (
        ("manifest.json", "manifest", manifest.to_text()),
        ("metrics.csv", "metrics", metrics_csv(manifest.training.history)),
    ):
        (target / name).write_text(text, encoding="utf-8")
        made.append(file_artifact(target / name, kind, control))
        sink.artifact(made[-1])
    if "adapter" not in manifest.spec.exports:
        # What is exported later starts from it.
        adapter = export_adapter(trained.adapter, manifest, trained.file_name("adapter"), target, control)
        made.append(replace(adapter, listed=False))
        sink.artifact(made[-1])
    made += make_exports(trained, manifest.spec.exports, root, sink, control, room)
    ggufs = [a for a in made if a.kind.startswith("gguf:")]
    if ggufs:
        # The smallest of them: what most people will run.
        smallest = min(ggufs, key=lambda a: a.bytes)
        made.append(publish_modelfile(trained, smallest.name, root, sink, control))
    return made
