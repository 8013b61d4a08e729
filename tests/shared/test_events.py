"""The sinks that need no database."""

from __future__ import annotations

import json
from pathlib import Path

from shared.events import Artifact, Checkpoint, Entry, EventSink, JsonlSink, MemorySink, Progress
from shared.lifecycle import Phase


def tell(sink: EventSink, folder: Path) -> None:
    sink.phase(Phase.TRAINING)
    sink.log(Entry("größer"))
    sink.metrics({"step": 1, "loss": 0.5})
    sink.progress(Progress(step=1, total_steps=2, epoch=0.5))
    sink.data_report({"rows_used": 3})
    sink.checkpoint(Checkpoint(step=1, path=folder, bytes=7, metrics={}))
    sink.artifact(Artifact(name="a.tar", kind="adapter", path=folder / "a.tar", bytes=7, sha256="0"))


def test_a_file_takes_one_object_a_call_in_order(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "events.jsonl")
    tell(sink, tmp_path)
    sink.close()
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = ["phase", "log", "metrics", "progress", "data_report", "checkpoint", "artifact"]
    assert [record["event"] for record in told] == kinds
    assert told[1]["message"] == "größer"
    assert told[2]["loss"] == 0.5
    assert told[6]["path"] == str(tmp_path / "a.tar")


def test_memory_keeps_each_kind_apart(tmp_path: Path) -> None:
    sink = MemorySink()
    tell(sink, tmp_path)
    assert sink.phases == [Phase.TRAINING]
    assert [entry.message for entry in sink.entries] == ["größer"]
    assert sink.rows == [{"step": 1, "loss": 0.5}]
    assert sink.reports == [{"rows_used": 3}]
    assert [c.step for c in sink.checkpoints] == [1]
    assert [a.name for a in sink.artifacts] == ["a.tar"]
    assert sink.progresses[0].total_steps == 2
