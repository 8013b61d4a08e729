"""Data sets of the hub, from a local server that answers as it does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.worker.training.data_hub import OLD_SHA, ROWS, SHA, ask, hub
from worker.training.hub_data import _numbered

# Nobody listens on the discard port.
NOBODY = "http://127.0.0.1:9"
WANTED: dict[str, dict[str, Any]] = {
    "newest": {"id": "team/chats"},
    "revision": {"id": "team/chats", "revision": "old"},
    "no revision": {"id": "team/chats", "revision": "none"},
    "no split": {"id": "team/chats", "split": "test"},
    "no config": {"id": "team/chats", "config": "other"},
    "missing": {"id": "nobody/nothing"},
    "gated": {"id": "team/gated"},
    "gated rows": {"id": "team/asks"},
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


def ask_for(
    wanted: dict[str, dict[str, Any]], endpoint: str, folder: Path, prelude: str = "", **more: str
) -> dict[str, Any]:
    (folder / "team" / "folder").mkdir(parents=True, exist_ok=True)
    (folder / "team" / "folder" / "train.jsonl").write_text(
        '{"text": "not from the hub"}\n', encoding="utf-8"
    )
    return ask(prelude + SCRIPT, wanted, endpoint, folder, **more)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with hub() as (address, asked):
        found = ask_for(WANTED, address, tmp_path_factory.mktemp("hub"))
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
        ("gated rows", "is gated"),
    ],
)
def test_what_is_not_there_is_said_clearly(answers: dict[str, Any], name: str, message: str) -> None:
    assert answers[name]["code"] == "invalid_dataset"
    assert message in answers[name]["message"]
    assert answers[name]["advice"]


def test_a_folder_of_that_name_is_not_taken_for_it(answers: dict[str, Any]) -> None:
    assert answers["folder"] == answers["newest"]


def test_nulls_that_arrow_fills_into_structs_are_left_out() -> None:
    rows = [
        {"text": None, "tools": [{"name": name, "parameters": {key: {"type": "string"}}}]}
        for name, key in (("f", "city"), ("g", "amount"))
    ]
    assert list(_numbered(datasets.Dataset.from_list(rows))) == list(enumerate(rows, 1))


def test_no_network(tmp_path: Path) -> None:
    found = ask_for({"any": {"id": "team/chats"}}, NOBODY, tmp_path)["any"]
    assert found["code"] == "invalid_dataset"
    assert "could not be reached" in found["message"]


@pytest.mark.parametrize("offline", [False, True])
def test_without_network_a_commit_that_was_loaded_serves_on(tmp_path: Path, offline: bool) -> None:
    with hub() as (address, _):
        loaded = ask_for({"rows": {"id": "team/chats"}}, address, tmp_path)["rows"]
    wanted = {
        "commit": {"id": "team/chats", "revision": SHA},
        "other": {"id": "team/chats", "revision": OLD_SHA},
        "branch": {"id": "team/chats", "revision": "main"},
        "config": {"id": "team/chats", "revision": SHA, "config": "other"},
    }
    # The hub's library tries for half a minute where it isn't told that there is no network.
    impatient = "import time; time.sleep = lambda seconds: None\n"
    found = ask_for(wanted, NOBODY, tmp_path, impatient, **({"HF_HUB_OFFLINE": "1"} if offline else {}))
    assert found["commit"] == loaded
    assert found["config"]["code"] == "invalid_dataset"
    for name in ("other", "branch"):
        # Never the rows of another revision.
        assert found[name]["code"] == "invalid_dataset"
        assert "could not be reached" in found[name]["message"]


SECRET = "another owner's row"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Data sets whose card names files that are none of theirs, or whose files are no plain rows."""
    folder = tmp_path_factory.mktemp("hostile")
    other = folder / "file-of-another-owner.txt"
    other.write_text(SECRET + "\n", encoding="utf-8")
    with hub() as (elsewhere, elsewhere_asked):
        cards = {
            "evil/local": str(other),
            "evil/up": f"../../../../../../../../../{other}",
            "evil/address": f"{elsewhere}/datasets/team/chats/resolve/main/train.jsonl",
            "evil/file-url": f"file://{other}",
            "evil/other-set": "hf://datasets/team/chats/train.jsonl",
        }
        sets = {
            name: {SHA: {"README.md": _card(path), "train.jsonl": b'{"text": "own"}\n'}}
            for name, path in cards.items()
        }
        sets["evil/pickle"] = {SHA: {"train.pkl": b"cos\nsystem\n(S'touch owned'\ntR."}}
        sets["evil/tar"] = {SHA: {"train.tar": b"\0" * 10240}}
        with hub(datasets=sets) as (address, _):
            found = ask_for({name: {"id": name} for name in sets}, address, folder)
        return {**found, "owned": (folder / "owned").exists(), "elsewhere": list(elsewhere_asked)}


@pytest.mark.parametrize(
    "name",
    ["evil/local", "evil/up", "evil/address", "evil/file-url", "evil/other-set", "evil/pickle", "evil/tar"],
)
def test_a_data_set_of_the_hub_has_no_files_but_its_own(hostile: dict[str, Any], name: str) -> None:
    assert hostile[name]["code"] == "invalid_dataset", hostile[name]
    assert SECRET not in str(hostile)
    assert not hostile["owned"]
    assert not [line for line in hostile["elsewhere"] if line.startswith("GET")]


def _card(path: str) -> bytes:
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {path!r}\n---\n"
    ).encode()
