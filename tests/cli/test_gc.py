"""`tuneyard gc` on a database and a data folder."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from cli.main import app
from shared.database import Database
from shared.settings import Settings
from shared.storage import Store
from tests.worker.test_retention import add_checkpoints, ended, steps_told


def test_gc_shows_first_and_removes_then(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEYARD_DATA_DIR", str(settings.root))
    monkeypatch.setenv("TUNEYARD_DATABASE_URL", settings.database())
    Store(settings.artifacts())
    job_id = ended(database, 31)
    add_checkpoints(database, settings, job_id, 5)
    shown = CliRunner().invoke(app, ["gc", "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert job_id in shown.output
    assert "would be removed" in shown.output
    assert steps_told(database, job_id) == [5]
    assert job_id in CliRunner().invoke(app, ["gc"]).output
    assert steps_told(database, job_id) == []
    assert job_id not in CliRunner().invoke(app, ["gc"]).output
