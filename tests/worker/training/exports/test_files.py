"""Tars and hashes."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import pytest

from shared.errors import JobFailure, JobStopped
from tests.worker.training.samples import Running
from worker.training.exports.files import file_artifact, tar_artifact


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "content"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "a.bin").write_bytes(bytes(range(256)) * 5000)
    (folder / "sub" / "c.txt").write_text("c")
    return folder


def test_a_tar_is_the_same_for_the_same_content(tmp_path: Path, folder: Path) -> None:
    artifacts = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (folder / "b.txt").touch()
        (folder / "b.txt").chmod(0o600 if name == "one" else 0o755)
        artifacts.append(tar_artifact("content.tar", "adapter", folder, tmp_path / name, Running()))
    first, second = (a.path.read_bytes() for a in artifacts)
    assert first == second
    assert artifacts[0].sha256 == hashlib.sha256(first).hexdigest()
    assert artifacts[0].bytes == len(first)
    with tarfile.open(artifacts[0].path) as tar:
        assert tar.getnames() == ["content/a.bin", "content/b.txt", "content/sub/c.txt"]
        tar.extractall(tmp_path / "out", filter="data")
    assert (tmp_path / "out" / "content" / "a.bin").read_bytes() == (folder / "a.bin").read_bytes()


def test_links_are_refused_and_nothing_is_left(tmp_path: Path, folder: Path) -> None:
    (folder / "link").symlink_to("/etc/hostname")
    with pytest.raises(JobFailure, match="link"):
        tar_artifact("content.tar", "adapter", folder, tmp_path, Running())
    assert not (tmp_path / "content.tar").exists()


def test_a_stop_leaves_no_half_tar(tmp_path: Path, folder: Path) -> None:
    control = Running()
    control.stop = True
    with pytest.raises(JobStopped):
        tar_artifact("content.tar", "adapter", folder, tmp_path, control)
    assert not (tmp_path / "content.tar").exists()


def test_a_file_is_hashed_as_it_is(folder: Path) -> None:
    artifact = file_artifact(folder / "a.bin", "gguf:f16", Running())
    assert (artifact.name, artifact.kind, artifact.bytes) == ("a.bin", "gguf:f16", 1_280_000)
    assert artifact.sha256 == hashlib.sha256((folder / "a.bin").read_bytes()).hexdigest()
