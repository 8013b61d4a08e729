"""Models of the hub, from a local server that answers as it does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.worker.training.data_hub import OLD_SHA, ROWS, SHA, Commits, ask, hub

pytestmark = pytest.mark.train

WANTED: dict[str, dict[str, Any]] = {
    "newest": {"model": "team/model"},
    "branch": {"model": "team/model", "model_revision": "old"},
    "tag": {"model": "team/model", "model_revision": "v1.0"},
    "commit": {"model": "team/model", "model_revision": OLD_SHA},
    "split": {"model": "team/split"},
    "no revision": {"model": "team/model", "model_revision": "none"},
    "gated": {"model": "team/gated"},
    "gated files": {"model": "team/asks"},
    "missing": {"model": "nobody/nothing"},
    "gone": {"model": "nobody/gone"},
    "pickled": {"model": "team/pickled"},
    "outside": {"model": "team/outside"},
    "adapter": {"model": "team/adapter"},
}
OUTSIDE = b'{"weight_map": {"a": "/else/where.safetensors"}}'
SCRIPT = """
import json, sys
from pathlib import Path
from shared.errors import JobFailure
from shared.events import MemorySink
from shared.spec import JobSpec
from tests.worker.training.samples import Running
from worker.training.data import prepare_data
from worker.training.models import fetch_weights, load_tokenizer, resolve_model
from worker.training.workdir import Workdir
answers = {}
for name, wanted in json.loads(sys.argv[1]).items():
    try:
        spec = JobSpec.model_validate({"dataset": {"source": "hub", "id": "team/chats"}, **wanted})
        model = resolve_model(spec, Workdir(Path("root"), Path("cache")), Running())
        before = [file.name for file in model.path.glob("*.safetensors")]
        fetch_weights(model)
        answers[name] = {
            "revision": model.revision, "path": str(model.path), "config": model.config,
            "complete": model.complete, "before": before,
            "files": sorted(file.name for file in model.path.iterdir()),
        }
        if name == "newest":
            data = prepare_data(spec, None, load_tokenizer(model), MemorySink(), Running(), 2048)
            answers[name]["report"] = data.report
    except JobFailure as failure:
        answers[name] = {"code": failure.code, "message": failure.message, "advice": failure.advice}
print(json.dumps(answers))
"""


def repositories(tiny_model: Path) -> dict[str, Commits]:
    files = {file.name: file.read_bytes() for file in tiny_model.iterdir()}
    config = json.loads(files["config.json"])
    old = {**files, "config.json": json.dumps({**config, "max_position_embeddings": 1024}).encode()}
    weights = files.pop("model.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    split = {
        **files,
        "model-1.safetensors": weights,
        "model-2.safetensors": weights,
        "model.safetensors.index.json": json.dumps(index).encode(),
    }
    whole = {**files, "model.safetensors": weights, "pytorch_model.bin": b"never", "run.py": b"never"}
    return {
        "team/model": {SHA: whole, OLD_SHA: old},
        "team/split": {SHA: split},
        "team/asks": {SHA: whole},
        "team/outside": {SHA: {**split, "model.safetensors.index.json": OUTSIDE}},
        "team/adapter": {SHA: {**whole, "adapter_config.json": b"{}", "adapter_model.safetensors": weights}},
        "team/pickled": {SHA: {**files, "pytorch_model.bin": b"never"}},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the process works: it holds a folder that is named as a model of the hub is."""
    path = tmp_path_factory.mktemp("models")
    (path / "team" / "model").mkdir(parents=True)
    (path / "team" / "model" / "config.json").write_text('{"not": "from the hub"}', encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def answers(folder: Path, tiny_model: Path) -> Iterator[dict[str, Any]]:
    with hub(repositories(tiny_model)) as (address, asked):
        yield {**ask(SCRIPT, WANTED, address, folder), "asked": asked}


def test_a_model_and_the_commit_that_was_used(answers: dict[str, Any], folder: Path) -> None:
    found = answers["newest"]
    assert found["revision"] == SHA
    assert Path(found["path"]).is_relative_to(folder / "home")
    assert found["config"]["max_position_embeddings"] == 2048
    # The weights come last, and of everything else only what is needed.
    assert found["before"] == []
    assert "model.safetensors" in found["files"]
    assert "tokenizer.json" in found["files"]
    assert not {"pytorch_model.bin", "run.py"} & set(found["files"])


def test_a_data_set_of_the_hub_is_prepared_with_a_model_of_the_hub(answers: dict[str, Any]) -> None:
    report = answers["newest"]["report"]
    assert (report["source"], report["id"], report["revision"]) == ("hub", "team/chats", SHA)
    assert report["rows_used"] == len(ROWS)


@pytest.mark.parametrize("name", ["branch", "tag", "commit"])
def test_a_revision(answers: dict[str, Any], name: str) -> None:
    assert answers[name]["revision"] == OLD_SHA
    assert answers[name]["config"]["max_position_embeddings"] == 1024


def test_files_are_asked_for_by_commit(answers: dict[str, Any]) -> None:
    files = [line for line in answers["asked"] if "/resolve/" in line and "/datasets/" not in line]
    assert files
    assert not [line for line in files if f"/{SHA}/" not in line and f"/{OLD_SHA}/" not in line]


@pytest.mark.parametrize(
    ("name", "message", "advice"),
    [
        ("no revision", "team/model has no such revision", "model_revision"),
        ("gated", "team/gated is gated", "HF_TOKEN"),
        ("gated files", "team/asks is gated", "HF_TOKEN"),
        ("missing", "There is no model nobody/nothing on the hub, or it is private", "HF_TOKEN"),
        ("gone", "There is no model nobody/gone on the hub", "Check the id"),
        ("pickled", "no safetensors weights", "Choose a model that has them"),
        ("outside", "names no files of the model", "Choose a complete model"),
    ],
)
def test_what_is_not_there_is_said_clearly(
    answers: dict[str, Any], name: str, message: str, advice: str
) -> None:
    assert answers[name]["code"] == "model_unavailable"
    assert message in answers[name]["message"]
    assert advice in answers[name]["advice"]


def test_an_adapter_in_a_repository_names_no_other_model(answers: dict[str, Any]) -> None:
    assert "model.safetensors" in answers["adapter"]["files"]
    assert not [name for name in answers["adapter"]["files"] if name.startswith("adapter_")]


@pytest.mark.parametrize("offline", [False, True])
def test_no_network(answers: dict[str, Any], folder: Path, offline: bool) -> None:
    """What was downloaded whole serves on; of the rest it is said that the hub can't be reached."""
    second = Path(answers["split"]["path"]) / "model-2.safetensors"
    second.unlink(missing_ok=True)
    wanted = {
        "whole": {"model": "team/model"},
        "branch": {"model": "team/model", "model_revision": "old"},
        "commit": {"model": "team/model", "model_revision": SHA},
        "other": {"model": "team/model", "model_revision": "other"},
        "partly": {"model": "team/split"},
        "never": {"model": "team/never"},
    }
    # Nobody listens on the discard port.
    found = ask(SCRIPT, wanted, "http://127.0.0.1:9", folder, **({"HF_HUB_OFFLINE": "1"} if offline else {}))
    assert {name: found[name].get("revision") for name in wanted} == {
        "whole": SHA,
        "branch": OLD_SHA,
        "commit": SHA,
        "other": None,
        "partly": None,
        "never": None,
    }
    assert found["whole"]["complete"]
    assert found["whole"]["path"] == answers["newest"]["path"]
    for name in ("other", "partly", "never"):
        assert found[name]["code"] == "model_unavailable"
        assert "could not be reached" in found[name]["message"]
