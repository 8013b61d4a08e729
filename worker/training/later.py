"""An export of a job that has succeeded: from its last adapter, or from a checkpoint's."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

from shared.events import Artifact, Control, EventSink
from worker.export_order import ADAPTER_FILE, LaterExport
from worker.training.exports.make import Trained, make_exports, publish_modelfile
from worker.training.exports.manifest import Manifest
from worker.training.exports.preflight import check_exports
from worker.training.library_log import library_messages
from worker.training.models import ResolvedModel, fetch_weights, load_tokenizer, resolve_model
from worker.training.room import Room
from worker.training.workdir import Workdir


def export_later(later: LaterExport, workdir: Workdir, sink: EventSink, control: Control) -> list[Artifact]:
    """Make the file on the CPU, and tell it to `sink`; a GGUF that is the smallest so far gets the Modelfile.

    Raises:
        JobFailure: `export_failed`, `out_of_disk` or `model_unavailable`.
        JobStopped: nothing half-written is left.
        NoRoomYet: the disk has the room, and it is promised to others.
    """
    with library_messages(sink), Room(workdir, sink) as room:
        return _export(later, workdir, sink, control, room)


def _export(
    later: LaterExport, workdir: Workdir, sink: EventSink, control: Control, room: Room
) -> list[Artifact]:
    stored = json.loads(later.manifest.read_text(encoding="utf-8"))
    # The very base that was trained, whatever the name stands for by now.
    spec = later.spec.model_copy(
        update={"exports": (later.format,), "model_revision": stored["model"]["revision"]}
    )
    folder = _unpack(later, workdir.root)
    needs_base = later.format != "adapter"
    if needs_base:
        model = resolve_model(spec, workdir, control)
        fetch_weights(model)
    else:
        model = ResolvedModel(spec.model, folder)
    # The adapter's folder has the tokenizer as it was trained, template and all.
    tokenizer = load_tokenizer(replace(model, path=folder))
    if needs_base:
        check_exports(spec, model, tokenizer, workdir, control, room, trained=True)
    manifest = Manifest.from_json(stored, later.spec, model)
    if later.checkpoint is not None:
        manifest = replace(manifest, training=replace(manifest.training, exported_step=later.checkpoint))
    trained = Trained(model, tokenizer, manifest, folder, later.checkpoint)
    made = make_exports(trained, spec.exports, workdir.root, sink, control, room)
    file = made[0]
    if file.kind.startswith("gguf:") and (later.smallest_gguf is None or file.bytes < later.smallest_gguf):
        made.append(publish_modelfile(trained, file.name, workdir.root, sink, control))
    return made


def _unpack(later: LaterExport, root: Path) -> Path:
    """The PEFT folder, with the checkpoint's weights if they are asked for."""
    unpacked = root / "unpacked"
    with tarfile.open(later.adapter) as tar:
        tar.extractall(unpacked, filter="data")
    folder = unpacked / "adapter"
    if later.weights is not None:
        shutil.copyfile(later.weights, folder / ADAPTER_FILE)
    return folder
