"""Files and uploads under `/v1`: terms, privacy, bounds, and what becomes of those whose time is over."""

from __future__ import annotations

import asyncio
import hashlib
from datetime import timedelta
from typing import Any

import pytest

from api.services.v1 import uploads
from shared.clock import utcnow
from shared.expired import remove_expired
from shared.repository.uploads import COMPLETING
from shared.tables import DatasetRow, UploadRow
from tests.api.conftest import GOOD_ROW, SPEC, Api, error_of
from tests.api.routes.test_queue import use_settings

pytestmark = pytest.mark.anyio

ROWS = b"".join(GOOD_ROW % n for n in range(10))


async def upload(api: Api, content: bytes = ROWS, **fields: Any) -> dict[str, Any]:
    answer = await api.ann.post(
        "/v1/files", data={"purpose": "fine-tune"} | fields, files={"file": ("r.jsonl", content)}
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def age(api: Api, table: type[DatasetRow] | type[UploadRow], row_id: str) -> None:
    """Let its time be over."""
    with api.database.write() as session:
        row = session.get(table, row_id)
        assert row is not None
        row.expires_at = utcnow() - timedelta(seconds=1)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": ""}, "purpose"),
        ({"purpose": "fine-tune-results"}, "purpose"),
        ({"expires_after[seconds]": "3600"}, "expires_after.anchor"),
        ({"expires_after[anchor]": "created_at"}, "expires_after.seconds"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "3599"}, "expires_after.seconds"),
        ({"expires_after[anchor]": "created_at", "expires_after[seconds]": "x" * 9}, "expires_after.seconds"),
        ({"format": "no-such"}, "format"),
        ({"expires_after": '{"anchor": "created_at", "seconds": 3600}'}, "expires_after"),
    ],
)
async def test_terms_that_can_not_be_are_refused_and_leave_nothing(
    api: Api, fields: dict[str, str], param: str
) -> None:
    data = {"purpose": "fine-tune"} | fields
    answer = await api.ann.post("/v1/files", data=data, files={"file": ("r.jsonl", ROWS)})
    assert error_of(answer, 400)["param"] == param
    assert answer.headers["x-should-retry"] == "false"
    assert (await api.ann.get("/v1/files")).json()["data"] == []
    assert list((api.context.settings.root / "uploads").iterdir()) == []


async def test_a_form_without_purpose_or_file(api: Api) -> None:
    answer = await api.ann.post("/v1/files", files={"file": ("r.jsonl", ROWS)})
    assert error_of(answer, 400)["param"] == "purpose"
    answer = await api.ann.post("/v1/files", json={"purpose": "fine-tune"})
    assert error_of(answer, 400)["param"] == "file"


async def test_a_file_that_can_not_be_trained_on_says_why(api: Api) -> None:
    file = await upload(api, b"no rows at all")
    assert file["status"] == "error"
    assert file["status_details"]
    answer = await api.ann.post(
        "/v1/fine_tuning/jobs", json={"model": SPEC["model"], "training_file": file["id"]}
    )
    error = error_of(answer, 400)
    assert (error["param"], error["code"]) == ("training_file", "dataset_unusable")


async def test_files_of_other_purposes_are_no_datasets(api: Api) -> None:
    file = await upload(api, b"\x00\x01 anything", purpose="user_data")
    assert (file["status"], file["purpose"]) == ("processed", "user_data")
    assert (await api.ann.get("/datasets")).json()["data"] == []
    error_of(await api.ann.get(f"/datasets/{file['id']}"), 404)
    error_of(await api.ann.delete(f"/datasets/{file['id']}"), 404)
    answer = await api.ann.post(
        "/v1/fine_tuning/jobs", json={"model": SPEC["model"], "training_file": file["id"]}
    )
    assert error_of(answer, 400)["param"] == "training_file"
    content = await api.ann.get(f"/v1/files/{file['id']}/content")
    assert content.content == b"\x00\x01 anything"
    assert content.headers["content-disposition"].startswith("attachment")
    assert content.headers["x-content-type-options"] == "nosniff"


async def test_a_file_whose_time_is_over_is_gone(api: Api) -> None:
    file = await upload(api, **{"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"})
    assert file["expires_at"] == file["created_at"] + 3600
    kept = await upload(api)
    with api.database.read() as session:
        row = session.get(DatasetRow, file["id"])
        assert row is not None
        key = row.key
    used = await api.create(dataset={"source": "file", "file_id": file["id"]})
    age(api, DatasetRow, file["id"])
    remove_expired(api.context.database, api.context.store)
    # A job that waits needs it.
    assert (await api.ann.get(f"/v1/files/{file['id']}")).status_code == 200
    await api.ann.post(f"/jobs/{used}/cancel")
    error_of(await api.ann.get(f"/v1/files/{file['id']}"), 404)
    error_of(await api.ann.get(f"/datasets/{file['id']}"), 404)
    remove_expired(api.context.database, api.context.store)
    assert [row["id"] for row in (await api.ann.get("/v1/files")).json()["data"]] == [kept["id"]]
    with pytest.raises(FileNotFoundError):
        list(api.context.store.read(key, 0, 1))


async def test_a_file_in_use_can_not_be_deleted(api: Api) -> None:
    file = await upload(api)
    await api.create(dataset={"source": "file", "file_id": file["id"]})
    answer = await api.ann.delete(f"/v1/files/{file['id']}")
    error_of(answer, 409)
    assert answer.headers["x-should-retry"] == "false"


async def begin(api: Api, size: int = len(ROWS), **fields: Any) -> str:
    body = {"bytes": size, "filename": "r.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    answer = await api.ann.post("/v1/uploads", json=body | fields)
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["id"]
    return found


async def part(api: Api, upload_id: str, content: bytes) -> str:
    answer = await api.ann.post(f"/v1/uploads/{upload_id}/parts", files={"data": ("p", content)})
    assert answer.status_code == 200, answer.text
    assert answer.json()["upload_id"] == upload_id
    found: str = answer.json()["id"]
    return found


async def test_parts_in_the_order_that_is_given(api: Api) -> None:
    upload_id = await begin(api, expires_after={"anchor": "created_at", "seconds": 7200})
    last, first = await part(api, upload_id, ROWS[100:]), await part(api, upload_id, ROWS[:100])
    complete = f"/v1/uploads/{upload_id}/complete"
    wrong = await api.ann.post(complete, json={"part_ids": [first, last], "md5": "0" * 32})
    assert error_of(wrong, 400)["param"] == "md5"
    short = await api.ann.post(complete, json={"part_ids": [first]})
    assert error_of(short, 400)["param"] == "part_ids"
    twice = await api.ann.post(complete, json={"part_ids": [first, first]})
    assert error_of(twice, 400)["param"] == "part_ids"
    other = await api.ann.post(complete, json={"part_ids": [first, "part_x"]})
    assert error_of(other, 400)["param"] == "part_ids.1"
    digest = hashlib.md5(ROWS, usedforsecurity=False).hexdigest()
    done = await api.ann.post(complete, json={"part_ids": [first, last], "md5": digest.upper()})
    file = done.json()["file"]
    assert (done.json()["status"], file["status"], file["bytes"]) == ("completed", "processed", len(ROWS))
    assert file["expires_at"] - file["created_at"] == pytest.approx(7200, abs=1)
    assert (await api.ann.get(f"/v1/files/{file['id']}/content")).content == ROWS
    for again in (complete, f"/v1/uploads/{upload_id}/cancel"):
        answer = await api.ann.post(again, json={"part_ids": [first, last]})
        error_of(answer, 409)
        assert answer.headers["x-should-retry"] == "false"
    assert not (api.context.settings.root / "artifacts" / "uploads" / upload_id / first).exists()


async def test_two_who_complete_at_once_make_one_file(api: Api) -> None:
    upload_id = await begin(api)
    body = {"part_ids": [await part(api, upload_id, ROWS)]}
    answers = await asyncio.gather(
        *(api.ann.post(f"/v1/uploads/{upload_id}/complete", json=body) for _ in range(4))
    )
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409, 409]
    assert len((await api.ann.get("/v1/files")).json()["data"]) == 1


async def test_an_upload_is_bounded(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_OPEN", 2)
    monkeypatch.setattr(uploads, "MAX_PARTS", 2)
    upload_id = await begin(api, 10)
    parts = f"/v1/uploads/{upload_id}/parts"
    large = error_of(await api.ann.post(parts, files={"data": ("p", b"x" * 11)}), 413)
    assert "10 bytes of the file are left" in large["message"]
    error_of(await api.ann.post(parts, files={"data": ("p", b"")}), 400)
    await part(api, upload_id, b"1")
    await part(api, upload_id, b"2")
    assert error_of(await api.ann.post(parts, files={"data": ("p", b"3")}), 400)["code"] == "over_limit"
    await begin(api, 10)
    body = {"bytes": 10, "filename": "r", "mime_type": "", "purpose": "batch"}
    assert error_of(await api.ann.post("/v1/uploads", json=body), 429)["code"] == "quota_exceeded"
    assert (await api.bob.post("/v1/uploads", json=body)).status_code == 200
    huge = body | {"bytes": api.context.settings.max_upload_bytes + 1}
    error_of(await api.bob.post("/v1/uploads", json=huge), 413)
    for wrong in ({"purpose": "other"}, {"bytes": 0}, {"bytes": "10"}, {"mime_type": None}, {"more": 1}):
        assert error_of(await api.bob.post("/v1/uploads", json=body | wrong), 400)["param"] in wrong


async def test_an_upload_whose_completion_was_cut_off_is_completed_again(api: Api) -> None:
    """As after a kill in between."""
    upload_id = await begin(api)
    part_id = await part(api, upload_id, ROWS)
    with api.database.write() as session:
        row = session.get(UploadRow, upload_id)
        assert row is not None
        row.status = COMPLETING
    error_of(await api.ann.post(f"/v1/uploads/{upload_id}/cancel"), 409)
    answer = await api.ann.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part_id]})
    assert answer.json()["status"] == "completed"
    assert answer.json()["file"]["bytes"] == len(ROWS)


async def test_who_completes_an_upload_second_makes_no_second_file(api: Api) -> None:
    upload_id = await begin(api)
    part_id = await part(api, upload_id, ROWS)
    path = f"/v1/uploads/{upload_id}/complete"
    answers = await asyncio.gather(*(api.ann.post(path, json={"part_ids": [part_id]}) for _ in range(4)))
    codes = sorted(answer.status_code for answer in answers)
    assert codes[0] == 200
    # Parts that are gone already are a store that did not answer.
    assert set(codes[1:]) <= {409, 503}
    assert len((await api.ann.get("/v1/files")).json()["data"]) == 1


async def test_an_upload_whose_time_is_over_goes_with_its_parts(api: Api) -> None:
    upload_id = await begin(api)
    part_id = await part(api, upload_id, ROWS)
    kept = api.context.settings.root / "artifacts" / "uploads" / upload_id / part_id
    assert kept.exists()
    age(api, UploadRow, upload_id)
    answer = await api.ann.post(f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part_id]})
    assert "expired" in error_of(answer, 409)["message"]
    remove_expired(api.context.database, api.context.store)
    assert not kept.exists()
    error_of(await api.ann.post(f"/v1/uploads/{upload_id}/cancel"), 404)


async def test_open_uploads_count_as_stored(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    use_settings(api, monkeypatch, max_stored_bytes=25)
    await begin(api, 10)
    second = await begin(api, 10)
    body = {"bytes": 10, "filename": "r", "mime_type": "", "purpose": "batch"}
    assert error_of(await api.ann.post("/v1/uploads", json=body), 429)["param"] == "quotas.stored_bytes"
    await api.ann.post(f"/v1/uploads/{second}/cancel")
    assert (await api.ann.post("/v1/uploads", json=body)).status_code == 200
