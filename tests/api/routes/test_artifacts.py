"""Downloads over HTTP."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from shared.settings import Settings
from shared.valkey import EmbeddedValkey
from tests.api.conftest import SPEC, Api, Live, create_keys, error_of, publish, started
from tests.conftest import Databases, wait_for
from tests.proxy import Proxy
from tests.s3 import S3Server

pytestmark = pytest.mark.anyio

CONTENT = bytes(range(256)) * 4000


@pytest.fixture(params=[pytest.param("folder", id=pytest.HIDDEN_PARAM), "s3"])
def settings(settings: Settings, request: pytest.FixtureRequest) -> Settings:
    """With each kind of store."""
    if request.param == "folder":
        return settings
    return settings.model_copy(update={"artifacts_url": request.getfixturevalue("s3_url")})


@dataclass
class Kept:
    """A complete file with CONTENT, its address, and what answers there."""

    api: Api
    url: str


@pytest.fixture(scope="module", params=[pytest.param("folder", id=pytest.HIDDEN_PARAM), "s3"])
async def kept(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    valkey: EmbeddedValkey,
    databases: Databases,
) -> AsyncIterator[Kept]:
    """One for all that only read it, in each kind of store."""
    folder = tmp_path_factory.mktemp("kept")
    url = databases.create()
    settings = Settings(data_dir=folder / "data", database_url=url, redis_url=valkey.url)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "s3":
            server: S3Server = request.getfixturevalue("s3_server")
            for name, value in server.environment().items():
                patch.setenv(name, value)
            settings = settings.model_copy(update={"artifacts_url": server.bucket()})
        database = databases.open(settings)
        async with started(settings, database, create_keys(database)) as api:
            yield Kept(api, await publish_content(api, folder))
        database.close()
    databases.drop(url)


async def publish_content(api: Api, folder: Path) -> str:
    job_id = await api.create()
    api.publish(job_id, "adapter.tar", CONTENT, folder)
    return f"/jobs/{job_id}/artifacts/adapter.tar"


@pytest.fixture
async def url(api: Api, tmp_path: Path) -> str:
    """The address of a complete file with CONTENT."""
    return await publish_content(api, tmp_path)


async def test_a_file_is_listed_and_downloaded(kept: Kept) -> None:
    listed = (await kept.api.ann.get(kept.url.removesuffix("/adapter.tar"))).json()["data"]
    digest = hashlib.sha256(CONTENT).hexdigest()
    assert listed[0].pop("created_at").endswith("Z")
    assert listed == [
        {"name": "adapter.tar", "kind": "adapter", "bytes": len(CONTENT), "sha256": digest, "url": kept.url}
    ]
    job = (await kept.api.ann.get(kept.url.partition("/artifacts")[0])).json()
    assert job["artifacts"][0]["url"] == kept.url
    answer = await kept.api.ann.get(kept.url)
    assert (answer.status_code, answer.content) == (200, CONTENT)
    headers = answer.headers
    assert headers["etag"] == f'"{digest}"'
    assert headers["content-disposition"] == 'attachment; filename="adapter.tar"'
    assert headers["accept-ranges"] == "bytes"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-length"] == str(len(CONTENT))


async def test_head_tells_the_same_without_the_file(kept: Kept) -> None:
    head, get = await kept.api.ann.head(kept.url), await kept.api.ann.get(kept.url)
    assert (head.status_code, head.content) == (200, b"")
    same = ("etag", "content-length", "content-type", "accept-ranges", "content-disposition")
    assert [head.headers[name] for name in same] == [get.headers[name] for name in same]
    assert (await kept.api.bob.head(kept.url)).status_code == 404


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, len(CONTENT)),
        ("bytes=100-199", 100, 200),
        ("bytes=1023999-", 1023999, len(CONTENT)),
        ("bytes=1023990-99999999", 1023990, len(CONTENT)),
        ("bytes=-10", len(CONTENT) - 10, len(CONTENT)),
        ("bytes=-99999999", 0, len(CONTENT)),
        ("bytes=-" + "9" * 30, 0, len(CONTENT)),
        ("bytes=5-" + "9" * 30, 5, len(CONTENT)),
        ("bytes=" + "0" * 30 + "5-9", 5, 10),
        ("Bytes= 5 - 9 ", 5, 10),
    ],
)
async def test_parts(kept: Kept, asked: str, start: int, end: int) -> None:
    answer = await kept.api.ann.get(kept.url, headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == CONTENT[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"
    assert answer.headers["content-length"] == str(end - start)


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=1024000-", "bytes=1024000-1024001", "bytes=-0", "bytes=9999999999999999999-",
        "bytes=" + "9" * 20 + "-", "bytes=" + "9" * 5000 + "-", "bytes=" + "9" * 30 + "-" + "9" * 31,
    ],
)  # fmt: skip
async def test_parts_beyond_the_end(kept: Kept, asked: str) -> None:
    answer = await kept.api.ann.get(kept.url, headers={"Range": asked})
    assert error_of(answer, 416)["code"] == "range_not_satisfiable"
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


@pytest.mark.parametrize(
    "asked",
    ["bytes=0-1,5-6", "bytes=5-1", "bytes=-", "bytes=a-b", "items=0-1", "", "bytes=" + "9" * 30 + "-5"],
)
async def test_ranges_that_are_answered_with_the_whole_file(kept: Kept, asked: str) -> None:
    answer = await kept.api.ann.get(kept.url, headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, CONTENT)


async def test_conditions(kept: Kept) -> None:
    etag = (await kept.api.ann.head(kept.url)).headers["etag"]
    for tags in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        answer = await kept.api.ann.get(kept.url, headers={"If-None-Match": tags})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert (await kept.api.ann.get(kept.url, headers={"If-None-Match": '"other"'})).status_code == 200
    part = {"Range": "bytes=0-9"}
    assert (await kept.api.ann.get(kept.url, headers=part | {"If-Range": etag})).status_code == 206
    for other in ('"other"', "Wed, 21 Oct 2015 07:28:00 GMT", f"W/{etag}"):
        assert (await kept.api.ann.get(kept.url, headers=part | {"If-Range": other})).content == CONTENT


@pytest.mark.parametrize(
    "name",
    ["absent.tar", "..", "%2e%2e", "..%2fadapter.tar", "%2fetc%2fpasswd", "%00", "adapter.tar%00", ".",
     "a%5cb", "adapter.tar/", "ADAPTER.TAR", "x" * 3000, "%ff", "adapter.tar%0a"],
)  # fmt: skip
async def test_names_that_are_none(kept: Kept, name: str) -> None:
    folder = kept.url.removesuffix("adapter.tar")
    answer = await kept.api.ann.get(httpx.URL(f"http://localhost{folder}{name}"))
    # httpx resolves `..` and `.` itself: then a list answers, and never a file.
    assert answer.status_code in (200, 307, 404)
    assert "content-disposition" not in answer.headers


async def test_an_unfinished_file_is_absent(kept: Kept) -> None:
    job_id = kept.url.split("/")[2]
    error = error_of(await kept.api.ann.get(f"/jobs/{job_id}/artifacts/merged_16bit.tar"), 404)
    assert error["code"] == "artifact_not_found"
    assert "adapter.tar" in error["message"]


async def test_a_file_that_the_store_lost(api: Api, url: str) -> None:
    job_id = url.split("/")[2]
    api.context.store.delete_tree(f"jobs/{job_id}")
    error_of(await api.ann.get(url), 404)


def _open_files(name: str) -> int:
    """How often this process has a file of this name open."""
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found += name in str(link.readlink())
    return found


@pytest.mark.parametrize("settings", ["folder"], indirect=True, ids=[pytest.HIDDEN_PARAM])
def test_a_client_that_goes_in_the_middle(live: Live, tmp_path: Path) -> None:
    with live.client() as client:
        job_id = client.post("/jobs", json=SPEC).json()["id"]
        publish(live.context, job_id, "merged_16bit.tar", bytes(64 << 20), tmp_path)
        with client.stream("GET", f"/jobs/{job_id}/artifacts/merged_16bit.tar") as answer:
            # Kept, for an iterator that is collected closes the connection.
            pieces = answer.iter_raw()
            next(pieces)
            assert _open_files("merged_16bit.tar") == 1
        wait_for(lambda: _open_files("merged_16bit.tar") == 0)


def test_raw_paths_reach_no_file(live: Live) -> None:
    for path in (
        "/jobs/../../etc/passwd",
        "/jobs/ftjob-000000000000000000000000/artifacts/../../../tuneyard.db",
        "/jobs/ftjob-000000000000000000000000/artifacts/..%2f..%2ftuneyard.db",
        "/jobs/ftjob-000000000000000000000000/artifacts/%00",
        "//etc/passwd",
        "/jobs/%2e%2e/artifacts/%2e%2e",
    ):
        request = (
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Authorization: Bearer {live.key}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
            connection.sendall(request.encode())
            assert connection.recv(65_536).startswith(b"HTTP/1.1 404")


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with Proxy.to_url(s3_server.endpoint) as running:
        yield running


@pytest.fixture
def behind_proxy(proxy: Proxy, s3_url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    return proxy


@pytest.mark.parametrize("settings", ["s3"], indirect=True)
async def test_a_store_that_is_away_is_said_and_holds_up_no_deletion(
    behind_proxy: Proxy, api: Api, url: str
) -> None:
    behind_proxy.cut()
    error = error_of(await api.ann.get(url), 503)
    assert error["code"] == "storage_unavailable"
    assert str(behind_proxy.port) not in error["message"]
    job = url.partition("/artifacts")[0]
    api.finish(job.rpartition("/")[2])
    assert (await api.ann.delete(job)).status_code == 204
    behind_proxy.restore()
    assert (await api.ann.get(url)).status_code == 404
