"""From a trained adapter to the files that were asked for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.events import Artifact, Control, Entry, EventSink
from shared.exports import artifact_name
from worker.training.exports.adapter import export_adapter
from worker.training.exports.files import file_artifact
from worker.training.exports.gguf import export_ggufs
from worker.training.exports.manifest import Manifest
from worker.training.exports.merged import export_merged, merge_adapter
from worker.training.exports.modelfile import modelfile, own_modelfile
from worker.training.models import ResolvedModel
from worker.training.room import Room


@dataclass(frozen=True)
class Trained:
    """What is exported: an adapter (a PEFT folder) of a model, and what is known of how it came to be.

    `checkpoint` is the step whose adapter it is, None for the one that training ended with.
    """

    model: ResolvedModel
    tokenizer: Any
    manifest: Manifest
    adapter: Path
    checkpoint: int | None = None

    def file_name(self, kind: str) -> str:
        return artifact_name(kind, self.checkpoint)


def make_exports(
    trained: Trained, formats: Sequence[str], root: Path, sink: EventSink, control: Control, room: Room
) -> list[Artifact]:
    """Make the files in `root`/exports and tell each as soon as it is complete.

    The cheap and certain ones come first: what fails late must not take the others with it. What they are
    made from is gone when this returns, and when it fails.

    Raises:
        JobFailure: `export_failed` or `out_of_disk`.
        JobStopped: no half-written file is left.
    """
    target = root / "exports"
    target.mkdir(parents=True, exist_ok=True)
    made: list[Artifact] = []
    if "adapter" in formats:
        name = trained.file_name("adapter")
        made.append(export_adapter(trained.adapter, trained.manifest, name, target, control))
        sink.artifact(made[-1])
    ggufs = [kind for kind in formats if kind.startswith("gguf:")]
    if not ggufs and "merged_16bit" not in formats:
        return made
    room.fit_exports()
    merged = root / "merged"
    try:
        sink.log(Entry(message="Merging the adapter into the base model."))
        merge_adapter(trained.model, trained.adapter, trained.tokenizer, merged, control)
        if "merged_16bit" in formats:
            name = trained.file_name("merged_16bit")
            made.append(export_merged(merged, trained.manifest, name, target, control))
            sink.artifact(made[-1])
        if ggufs:
            files = {kind: trained.file_name(kind) for kind in ggufs}
            title = trained.manifest.spec.name or trained.model.id
            made += export_ggufs(merged, title, files, target, sink, control)
    finally:
        shutil.rmtree(merged, ignore_errors=True)
    return made


def publish_modelfile(
    trained: Trained, gguf_name: str, root: Path, sink: EventSink, control: Control
) -> Artifact:
    """`Modelfile`, with which Ollama runs this GGUF."""
    write = own_modelfile if trained.manifest.spec.chat_template == "model" else modelfile
    path = root / "exports" / trained.file_name("modelfile")
    path.write_text(write(gguf_name, trained.manifest.stop_token), encoding="utf-8")
    artifact = file_artifact(path, "modelfile", control)
    sink.artifact(artifact)
    return artifact
