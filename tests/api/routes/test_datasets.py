"""Uploads and datasets over HTTP."""

from __future__ import annotations

import asyncio
import errno
import gzip
import hashlib
import io
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow
import pytest
from pyarrow import parquet

from api.context import Context
from api.services import files, inspection
from shared.settings import Settings
from shared.tables import DatasetRow
from tests.api.conftest import GOOD_ROW, SPEC, Api, Live, error_of, eventually
from tests.conftest import wait_for

pytestmark = pytest.mark.anyio

ROWS = b"".join(GOOD_ROW % n for n in range(20))
FIELDS = {"id", "filename", "bytes", "sha256", "status", "format", "report", "error", "created_at"}


async def upload(api: Api, content: bytes, name: str = "rows.jsonl", **fields: str) -> httpx.Response:
    return await api.ann.post("/datasets", files={"file": (name, content)}, data=fields)


def left_in(settings: Settings) -> list[Path]:
    return list((settings.root / "uploads").glob("*"))


async def test_a_file_is_stored_and_looked_into(api: Api, settings: Settings) -> None:
    answer = await upload(api, ROWS)
    assert answer.status_code == 201
    found = answer.json()
    assert set(found) == FIELDS
    assert found["sha256"] == hashlib.sha256(ROWS).hexdigest()
    assert (found["bytes"], found["status"], found["format"]) == (len(ROWS), "processed", "messages")
    assert found["report"]["rows_used"] == 20
    assert (await api.ann.get(f"/datasets/{found['id']}")).json() == found
    assert (await api.ann.get("/datasets")).json() == {"data": [found], "has_more": False, "next": None}
    assert b"".join(api.context.store.read(f"datasets/{found['id']}/data", 0, len(ROWS))) == ROWS
    assert left_in(settings) == []


async def test_a_large_file_is_looked_into_later(
    api: Api, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _change(api, settings.model_copy(update={"inline_inspect_bytes": 100}))
    first = (await upload(api, ROWS)).json()
    assert (first["status"], first["report"]) == ("uploaded", None)
    broken = (await upload(api, ROWS + b'{"messages": [\n')).json()
    # It can be used at once: what is not known yet refuses no job.
    spec = SPEC | {"dataset": {"source": "file", "file_id": first["id"]}}
    assert (await api.ann.post("/jobs", json=spec)).status_code == 201

    async def looked_into(dataset_id: str) -> Any:
        found = (await api.ann.get(f"/datasets/{dataset_id}")).json()
        return found if found["status"] != "uploaded" else None

    good = await eventually(lambda: looked_into(first["id"]))
    assert (good["status"], good["report"]["rows_used"]) == ("processed", 20)
    bad = await eventually(lambda: looked_into(broken["id"]))
    assert bad["status"] == "error"
    assert "line 21" in bad["error"].lower()


def _parquet(rows: int) -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["hello"] * rows}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (gzip.compress(ROWS), "processed"),
        (pyarrow.compress(ROWS, "zstd", asbytes=True), "processed"),
        (_parquet(100), "processed"),
        (gzip.compress(b"{"), "error"),
        (b"\x1f\x8b", "error"),
        (b"PAR1", "error"),
    ],
    ids=["gzip", "zstd", "parquet", "broken row", "broken gzip", "broken parquet"],
)
async def test_a_small_packed_file_is_looked_into_elsewhere_and_waited_for(
    shared_api: Api, content: bytes, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(*_: Any) -> None:
        pytest.fail("must not be unpacked in the API's process")

    monkeypatch.setattr(files, "inspect", here)
    monkeypatch.setattr(files, "LOOK_SECONDS", 30.0)
    found = (await upload(shared_api, content)).json()
    assert found["status"] == status, found
    assert (await shared_api.ann.get(f"/datasets/{found['id']}")).json() == found


async def test_a_small_packed_file_is_waited_for_no_longer_than_seconds(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def endless(*_: Any) -> None:
        await asyncio.sleep(3600)

    monkeypatch.setattr(inspection, "_inspect_in_child", endless)
    monkeypatch.setattr(files, "LOOK_SECONDS", 0.05)
    answer = await upload(api, gzip.compress(ROWS))
    assert (answer.status_code, answer.json()["status"]) == (201, "uploaded")


async def test_an_upload_that_nobody_looked_into_is_found_at_the_start(api: Api, settings: Settings) -> None:
    dataset = (await upload(api, ROWS)).json()
    with api.database.write() as session:
        row = session.get(DatasetRow, dataset["id"])
        assert row is not None
        row.status, row.report = "uploaded", None
    await api.context.inspector.stop()
    await api.context.inspector.start()

    async def looked_into() -> bool:
        answer = await api.ann.get(f"/datasets/{dataset['id']}")
        return bool(answer.json()["status"] == "processed")

    await eventually(looked_into)


def _change(api: Api, settings: Settings) -> None:
    context = Context(**{**api.context.__dict__, "settings": settings})
    api.app.state.context = context


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"".join(GOOD_ROW % n for n in range(6)) + b'{"messages": [oops\n' + GOOD_ROW % 7, "line 7"),
        (bytes(range(256)) * 20, ""),
        (b"\x7fELF" + os.urandom(500), ""),
        (b'{"unknown": 1}\n' * 5, "unknown"),
        (b'{"messages":[{"role":"user","content":"no answer"}]}\n', ""),
        (b"   \n\n  ", "empty"),
        (b"{" * 100_000, "line 1"),
    ],
)
async def test_a_file_that_can_not_be_used_says_why(shared_api: Api, content: bytes, words: str) -> None:
    answer = await upload(shared_api, content)
    assert answer.status_code == 201
    found = answer.json()
    assert (found["status"], found["report"]) == ("error", None)
    assert words in found["error"].lower()


async def test_no_file_and_an_empty_file(api: Api, settings: Settings) -> None:
    assert error_of(await upload(api, b""), 422)["code"] == "empty_file"
    only_field = await api.ann.post("/datasets", files={"format": (None, "auto")})
    assert error_of(only_field, 422)["param"] == "file"
    assert error_of(await api.ann.post("/datasets", json={}), 422)["param"] == "file"
    assert error_of(await api.ann.post("/datasets"), 422)["param"] == "file"
    assert error_of(await upload(api, ROWS, format="parchment"), 422)["param"] == "format"
    assert left_in(settings) == []
    assert (await api.ann.get("/datasets")).json()["data"] == []


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"--x\r\n",
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nabc',
        b"--x\r\n" + b"A" * 10_000 + b": b\r\n\r\n",
    ],
)
async def test_forms_that_are_broken(shared_api: Api, body: bytes) -> None:
    answer = await shared_api.ann.post(
        "/datasets", content=body, headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert answer.status_code in (400, 422)
    error_of(answer, answer.status_code)
    assert left_in(shared_api.context.settings) == []


@pytest.mark.parametrize("length", [257, 5000])
async def test_a_boundary_that_is_too_long(shared_api: Api, length: int) -> None:
    boundary = "b" * length
    part = 'Content-Disposition: form-data; name="file"; filename="a"'
    body = f"--{boundary}\r\n{part}\r\n\r\nx\r\n--{boundary}--"
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    answer = await shared_api.ann.post("/datasets", content=body, headers=headers)
    assert error_of(answer, 400)["code"] == "malformed_multipart"
    assert left_in(shared_api.context.settings) == []


async def test_fields_come_in_any_order(shared_api: Api) -> None:
    for order in (["format", "name", "file"], ["file", "name", "format"]):
        values: dict[str, Any] = {
            "format": (None, "messages"), "name": (None, "My rows"), "file": ("a.jsonl", ROWS),
        }  # fmt: skip
        answer = await shared_api.ann.post("/datasets", files=[(name, values[name]) for name in order])
        assert answer.status_code == 201, answer.text
        assert (answer.json()["filename"], answer.json()["format"]) == ("My rows", "messages")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\rows.jsonl", "rows.jsonl"),
        ("/abs/olute.jsonl", "olute.jsonl"),
        ("..", ".."),
        ("x" * 1000, "x" * 255),
        ("données.jsonl", "données.jsonl"),
        ("/", "unnamed"),
    ],
)
async def test_names_are_only_shown(api: Api, settings: Settings, given: str, shown: str) -> None:
    answer = await upload(api, ROWS, name=given)
    assert answer.json()["filename"] == shown
    stored = [path for path in settings.root.rglob("*") if path.is_file() and "datasets" in path.parts]
    assert [path.name for path in stored] == ["data"]


async def test_a_file_over_the_limit(api: Api, settings: Settings) -> None:
    _change(api, settings.model_copy(update={"max_upload_bytes": 1000}))
    assert error_of(await upload(api, b"x" * 1001), 413)["param"] == "file"
    assert (await upload(api, ROWS[:1000])).status_code == 201

    async def endless() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b"y" * 65_536

    headers = {"content-type": "multipart/form-data; boundary=x"}
    error_of(await api.ann.post("/datasets", content=endless(), headers=headers), 413)

    async def preamble() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="other"\r\n\r\n'
        for _ in range(100):
            yield b"y" * 65_536

    error_of(await api.ann.post("/datasets", content=preamble(), headers=headers), 422)
    assert left_in(settings) == []


async def test_a_full_disk(api: Api, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(api.context.store, "publish", full)
    error = error_of(await upload(api, ROWS), 503)
    assert error["code"] == "storage_unavailable"
    assert left_in(settings) == []


async def test_datasets_belong_to_their_owner(shared_api: Api) -> None:
    dataset_id = (await upload(shared_api, ROWS)).json()["id"]
    error_of(await shared_api.bob.get(f"/datasets/{dataset_id}"), 404)
    error_of(await shared_api.bob.delete(f"/datasets/{dataset_id}"), 404)
    assert (await shared_api.bob.get("/datasets")).json()["data"] == []
    error_of(await shared_api.bob.get(f"/datasets?after={dataset_id}"), 422)
    assert (await shared_api.root.get(f"/datasets/{dataset_id}")).status_code == 200


async def test_lists_are_paged(api: Api) -> None:
    made = [(await upload(api, ROWS, name=f"{n}.jsonl")).json()["id"] for n in range(3)]
    first = (await api.ann.get("/datasets?limit=2")).json()
    rest = (await api.ann.get(f"/datasets?limit=2&after={first['next']}")).json()
    assert [row["id"] for row in first["data"] + rest["data"]] == made[::-1]
    assert (first["has_more"], rest["has_more"], rest["next"]) == (True, False, None)


@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
async def test_a_dataset_in_use_is_kept(api: Api, field: str) -> None:
    dataset_id = (await upload(api, ROWS)).json()["id"]
    job_id = await api.create(**{field: {"source": "file", "file_id": dataset_id}})
    error_of(await api.ann.delete(f"/datasets/{dataset_id}"), 409)
    await api.ann.post(f"/jobs/{job_id}/cancel")
    answer = await api.ann.delete(f"/datasets/{dataset_id}")
    assert (answer.status_code, answer.content) == (204, b"")
    error_of(await api.ann.get(f"/datasets/{dataset_id}"), 404)
    with pytest.raises(FileNotFoundError):
        next(api.context.store.read(f"datasets/{dataset_id}/data", 0, 1))


def _head(live: Live, length: int) -> bytes:
    head = (
        "POST /datasets HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        f"Authorization: Bearer {live.key}\r\nContent-Length: {length}\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    )
    return head.encode()


def test_a_client_that_goes_in_the_middle_leaves_nothing(live: Live, settings: Settings) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        connection.sendall(_head(live, 100 << 20) + b"y" * (8 << 20))
        wait_for(lambda: [path for path in left_in(settings) if path.stat().st_size > 1 << 20])
    wait_for(lambda: not left_in(settings))
    with live.client() as client:
        assert client.get("/datasets").json()["data"] == []


def test_a_large_upload_is_never_held_in_memory(live: Live, settings: Settings) -> None:
    size = 200 << 20
    piece = b'{"text": "' + b"z" * 1_000_000 + b'"}\n'

    def body() -> Iterator[bytes]:
        sent = 0
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        while sent < size:
            sent += len(piece)
            yield piece
        yield b"\r\n--x--\r\n"

    before = _peak_kb()
    with live.client() as client:
        headers = {"content-type": "multipart/form-data; boundary=x"}
        answer = client.post("/datasets", content=body(), headers=headers, timeout=60)
        assert answer.status_code == 201, answer.text
        assert answer.json()["bytes"] >= size
        assert answer.json()["status"] == "uploaded"
        assert _peak_kb() - before < 60_000
        assert client.delete(f"/datasets/{answer.json()['id']}").status_code == 204


def _peak_kb() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    assert sys.platform == "linux"
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
