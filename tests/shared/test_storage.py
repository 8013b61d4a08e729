from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from shared.storage import CHUNK, Store, StoreUnavailable, account
from tests.proxy import Proxy
from tests.s3 import ACCOUNT, S3Server

STORES = ["file", "memory", "s3"]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder, an fsspec file system that is none, and an S3-compatible server."""
    if request.param == "s3":
        return Store(f"{request.getfixturevalue('s3_url')}/some/prefix")
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


def test_what_another_process_put_there_is_seen(s3_url: str, tmp_path: Path) -> None:
    one, other = Store(s3_url), Store(s3_url)
    put(one, tmp_path, "jobs/a/t/one", b"1")
    assert [file.name for file in other.list_files()] == ["jobs/a/t/one"]
    put(one, tmp_path, "jobs/b/t/two", b"2")
    other.delete_tree("jobs/b")
    assert [file.name for file in one.list_files()] == ["jobs/a/t/one"]


def test_a_store_needs_no_account_in_the_environment(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = account(os.environ)
    assert found == ACCOUNT
    for name in found:
        monkeypatch.delenv(name)
    put(Store(s3_url, found), tmp_path, "jobs/a/t/one", b"1")
    assert Store(s3_url, found).fetch("jobs/a/t/one", tmp_path / "copy").read_bytes() == b"1"


def test_parts_of_an_upload_that_was_killed_are_removed(s3_url: str, tmp_path: Path) -> None:
    store = Store(f"{s3_url}/prefix")
    bucket = s3_url.removeprefix("s3://")
    for key in ("prefix/jobs/a/t/model.tar", "elsewhere"):
        store._fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    (unfinished,) = store.unfinished_uploads()
    assert unfinished.name == "jobs/a/t/model.tar"
    store.abort_upload(unfinished)
    store.abort_upload(unfinished)
    assert [upload["Key"] for upload in store._fs.list_multipart_uploads(bucket)] == ["elsewhere"]


def test_a_store_that_is_away_is_an_error_without_its_address(
    s3_server: S3Server, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy.to_url(s3_server.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = Store(s3_url)
        put(store, tmp_path, "jobs/a/t/one", b"1")
        proxy.cut()
        began = time.monotonic()
        for use in (
            lambda: store.delete("jobs/a/t/one"),
            lambda: store.fetch("jobs/a/t/one", tmp_path / "copy"),
            lambda: list(store.read("jobs/a/t/one", 0, 1)),
            lambda: list(store.list_files()),
            lambda: put(store, tmp_path, "jobs/a/t/two", b"2"),
        ):
            with pytest.raises(StoreUnavailable, match=r"^The artifact store does not answer\.$"):
                use()
        assert not store.is_writable()
        assert time.monotonic() - began < 30
        proxy.restore()
        put(store, tmp_path, "jobs/a/t/two", b"2")
        assert b"".join(store.read("jobs/a/t/one", 0, 1)) == b"1"


@pytest.mark.parametrize("parts", [1, 9])
def test_what_is_written_appears_whole(request: pytest.FixtureRequest, store: Store, parts: int) -> None:
    """Also if it is more than the store is sent at a time. Files in memory are there from the start."""
    with store.writing("jobs/a/t/one") as file:
        for _ in range(parts):
            file.write(bytes(CHUNK))
        seen = [found.name for found in store.list_files()]
    assert "jobs/a/t/one" not in seen or request.node.callspec.params["store"] == "memory"
    assert sum(map(len, store.read("jobs/a/t/one", 0, parts * CHUNK + 1))) == parts * CHUNK


@pytest.mark.parametrize("parts", [1, 9])
@pytest.mark.parametrize("kind", ["file", "s3"])
def test_what_was_half_written_is_not_there(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, parts: int
) -> None:
    url = (tmp_path / "store").as_uri() if kind == "file" else str(request.getfixturevalue("s3_url"))
    store = Store(url)

    def write() -> None:
        with store.writing("jobs/a/t/one") as file:
            for _ in range(parts):
                file.write(bytes(CHUNK))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert list(store.list_files()) == []
    assert list(store.unfinished_uploads()) == []
