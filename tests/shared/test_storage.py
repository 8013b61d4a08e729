from __future__ import annotations

from pathlib import Path

import pytest

from shared.storage import CHUNK, Store

STORES = ["file", "memory"]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder, and an fsspec file system that is none."""
    if request.param == "memory":
        return Store(f"memory://{tmp_path.name}")
    return Store((tmp_path / "store").as_uri())


def put(store: Store, tmp_path: Path, key: str, content: bytes) -> None:
    source = tmp_path / "source"
    source.write_bytes(content)
    store.publish(source, key)
    assert not source.exists()


def test_what_is_published_is_read_back_in_ranges(store: Store, tmp_path: Path) -> None:
    content = bytes(range(256)) * 8192
    put(store, tmp_path, "jobs/a/t/model.tar", content)
    assert b"".join(store.read("jobs/a/t/model.tar", 0, len(content))) == content
    assert b"".join(store.read("jobs/a/t/model.tar", 1000, 2001)) == content[1000:2001]
    assert all(len(c) <= CHUNK for c in store.read("jobs/a/t/model.tar", 0, len(content)))
    assert store.fetch("jobs/a/t/model.tar", tmp_path / "copy").read_bytes() == content


def test_deleting(store: Store, tmp_path: Path) -> None:
    put(store, tmp_path, "jobs/a/t/one", b"1")
    put(store, tmp_path, "jobs/a/t/two", b"2")
    put(store, tmp_path, "jobs/b/t/three", b"3")
    store.delete("jobs/a/t/one")
    store.delete("jobs/a/t/one")
    store.delete_tree("jobs/a")
    store.delete_tree("jobs/a")
    with pytest.raises(FileNotFoundError):
        store.fetch("jobs/a/t/two", tmp_path / "copy")
    assert b"".join(store.read("jobs/b/t/three", 0, 1)) == b"3"


@pytest.mark.parametrize(
    "key", ["../x", "a/../b", "/etc/passwd", "a//b", "", "a/", "a\x00b", "a/.hidden", "~/x", "a\\b", "a b"]
)
def test_keys_are_never_paths_out_of_the_store(store: Store, tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="not a store key"):
        store.fetch(key, tmp_path / "copy")


def test_a_local_file_keeps_no_trace_of_an_unfinished_copy(tmp_path: Path) -> None:
    store = Store((tmp_path / "store").as_uri())
    with pytest.raises(FileNotFoundError):
        store.publish(tmp_path / "absent", "jobs/a/t/x")
    assert [p for p in (tmp_path / "store").rglob("*") if p.is_file()] == []


def test_readiness_and_free_space(store: Store) -> None:
    assert store.is_writable()
    free = store.free_bytes()
    assert free is None or free > 0
