"""The bench of training: one way on the CPU, and its table."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import train
from bench.standins import make_model, write_rows


@pytest.mark.train
def test_a_way_through_the_service_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "LENGTH", 256)
    monkeypatch.setattr(train, "MICRO_BATCH", 1)
    monkeypatch.setattr(train, "WARM_UP_STEPS", 1)
    make_model("tiny", tmp_path)
    write_rows(tmp_path / "train-rows.jsonl", 60)
    way = next(way for way in train.WAYS if way.name == "reference")
    found = train.ours(way, "tiny", tmp_path, 3)
    assert found["tokens_per_second"] > 0
    assert found["peak_memory_bytes"] > 1e6
    assert len(found["losses"]) == 3
    assert set(found["seconds"]) == {"import", "data", "load", "first step"}
    failed = {"name": "seed", "error": "ModuleNotFoundError: No module named 'unsloth'"}
    train.print_table([{"name": way.name, **found}, failed])
    printed = capsys.readouterr().out
    assert f"{found['losses'][-1]:.4f}" in printed
    assert "failed: ModuleNotFoundError" in printed
