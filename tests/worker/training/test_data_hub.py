"""Data sets of the hub, from a local server that answers as it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.worker.training.data_hub import OLD_SHA, ROWS, SHA, hub

# The hub's address is read when its library is imported: a process of its own asks for all of these.
WANTED: dict[str, dict[str, Any]] = {
    "newest": {"id": "team/chats"},
    "revision": {"id": "team/chats", "revision": "old"},
    "no revision": {"id": "team/chats", "revision": "none"},
    "no split": {"id": "team/chats", "split": "test"},
    "no config": {"id": "team/chats", "config": "other"},
    "missing": {"id": "nobody/nothing"},
    "gated": {"id": "team/gated"},
    "folder": {"id": "team/folder"},
}
SCRIPT = """
import json, sys
from shared.errors import JobFailure
from shared.spec import HubDataset
from worker.training.hub_data import hub_rows, resolved_revision
answers = {}
for name, wanted in json.loads(sys.argv[1]).items():
    try:
        dataset = HubDataset(**wanted)
        revision = resolved_revision(dataset)
        answers[name] = {"rows": list(hub_rows(dataset, revision)), "revision": revision}
    except JobFailure as failure:
        answers[name] = {"code": failure.code, "message": failure.message, "advice": failure.advice}
print(json.dumps(answers))
"""


def ask(wanted: dict[str, dict[str, Any]], endpoint: str, folder: Path) -> dict[str, Any]:
    (folder / "team" / "folder").mkdir(parents=True, exist_ok=True)
    (folder / "team" / "folder" / "train.jsonl").write_text(
        '{"text": "not from the hub"}\n', encoding="utf-8"
    )
    root = str(Path(__file__).resolve().parents[3])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(folder / "home"),
        "PYTHONPATH": root,
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(wanted)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return dict(json.loads(result.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with hub() as (address, asked):
        found = ask(WANTED, address, tmp_path_factory.mktemp("hub"))
        yield {**found, "asked": asked}


def test_rows_and_the_commit_that_was_used(answers: dict[str, Any]) -> None:
    assert answers["newest"]["rows"] == [[number, row] for number, row in enumerate(ROWS, 1)]
    assert answers["newest"]["revision"] == SHA
    assert answers["revision"]["rows"] == [[1, ROWS[0]]]
    assert answers["revision"]["revision"] == OLD_SHA
    # Files are asked for by commit, never by a name that may move meanwhile.
    assert not [
        line for line in answers["asked"] if "/resolve/" in line and SHA not in line and OLD_SHA not in line
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no revision", "has no revision none"),
        ("no split", 'Unknown split "test". Should be one of'),
        ("no config", "'other' not found"),
        ("missing", "has no data set nobody/nothing, or it is private"),
        ("gated", "is gated"),
        ("folder", "The worker's own folder holds something named team/folder"),
    ],
)
def test_what_is_not_there_is_said_clearly(answers: dict[str, Any], name: str, message: str) -> None:
    assert answers[name]["code"] == "invalid_dataset"
    assert message in answers[name]["message"]
    assert answers[name]["advice"]


def test_no_network(tmp_path: Path) -> None:
    # Nobody listens on the discard port.
    found = ask({"any": {"id": "team/chats"}}, "http://127.0.0.1:9", tmp_path)["any"]
    assert found["code"] == "invalid_dataset"
    assert "could not be reached" in found["message"]
