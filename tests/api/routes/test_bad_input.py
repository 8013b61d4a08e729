"""What is refused, and how clearly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import SPEC, Api, error_of

pytestmark = pytest.mark.anyio

MALFORMED = [
    b"",
    b"{",
    b"{'a': 1}",
    b'{"name": "a",}',
    b"\xef\xbb\xbf{}",
    b'{"name": "\xff"}',
    b'{"name": "\\ud800"}',
    b"[" * 10_000,
    b'{"metadata":' * 10_000,
    b'{"training":{"seed":' + b"9" * 5000 + b"}}",
    b"name=x&model=y",
]
WRONG: list[tuple[str, str, str | None]] = [
    ("[]", "invalid_type", None),
    ("null", "invalid_type", None),
    ('"text"', "invalid_type", None),
    ('{"lerning_rate": 1}', "unknown_field", "lerning_rate"),
    ('{"lora": {"rank": 8}}', "unknown_field", "lora.rank"),
    ('{"training": {"batch": 8}}', "unknown_field", "training.batch"),
    ('{"lora": {"r": "16"}}', "invalid_type", "lora.r"),
    ('{"lora": {"r": 1.5}}', "invalid_type", "lora.r"),
    ('{"lora": {"r": true}}', "invalid_type", "lora.r"),
    ('{"lora": 5}', "invalid_type", "lora"),
    ('{"packing": 1}', "invalid_type", "packing"),
    ('{"lora": {"r": 0}}', "out_of_range", "lora.r"),
    ('{"lora": {"r": 513}}', "out_of_range", "lora.r"),
    ('{"lora": {"dropout": -0.1}}', "out_of_range", "lora.dropout"),
    ('{"lora": {"target_modules": []}}', "out_of_range", "lora.target_modules"),
    ('{"training": {"learning_rate": NaN}}', "out_of_range", "training.learning_rate"),
    ('{"training": {"learning_rate": Infinity}}', "out_of_range", "training.learning_rate"),
    ('{"training": {"learning_rate": -Infinity}}', "out_of_range", "training.learning_rate"),
    ('{"training": {"learning_rate": 1e999}}', "out_of_range", "training.learning_rate"),
    ('{"training": {"learning_rate": 0}}', "out_of_range", "training.learning_rate"),
    ('{"training": {"max_steps": NaN}}', "invalid_type", "training.max_steps"),
    ('{"training": {"num_train_epochs": 1e9}}', "out_of_range", "training.num_train_epochs"),
    ('{"training": {"seed": 99999999999999999999999}}', "out_of_range", "training.seed"),
    ('{"max_seq_length": 10000000000}', "out_of_range", "max_seq_length"),
    ('{"exports": ["gguf:q9_9"]}', "invalid_value", "exports.0"),
    ('{"exports": ["adapter", "adapter"]}', "invalid_value", "exports"),
    ('{"report_to": ["pigeon"]}', "invalid_value", "report_to.0"),
    ('{"report_to": ["wandb", "wandb"]}', "invalid_value", "report_to"),
    ('{"wandb": {"project": "p"}}', "invalid_value", "wandb"),
    ('{"report_to": ["wandb"], "wandb": {"project": "a/b"}}', "invalid_value", "wandb.project"),
    ('{"engine": "warp"}', "invalid_value", "engine"),
    ('{"name": "a\\u0000b"}', "invalid_value", "name"),
    ('{"metadata": {"k": 1}}', "invalid_type", "metadata.k"),
    ('{"dataset": {"id": "a/b"}}', "missing_field", "dataset.source"),
    ('{"dataset": {"source": "ftp"}}', "invalid_value", "dataset.source"),
    ('{"dataset": {"source": "file", "file_id": "../../etc/passwd"}}', "invalid_value", "dataset.file_id"),
    ('{"dataset": {"source": "hub", "id": "../up"}}', "invalid_value", "dataset.id"),
    ('{"dataset": {"source": "hub", "path": "a"}}', "unknown_field", "dataset.path"),
    ('{"model": "/etc/passwd"}', "invalid_value", "model"),
    ('{"model": "../../etc"}', "invalid_value", "model"),
    ('{"model": "a/../b"}', "invalid_value", "model"),
    ('{"model": "local/../../etc"}', "invalid_value", "model"),
    ('{"model": "a\\u0000b"}', "invalid_value", "model"),
    ('{"model": "https://example.org/m"}', "invalid_value", "model"),
    ('{"model_revision": "../x"}', "invalid_value", "model_revision"),
]


@pytest.fixture(scope="module")
def api(shared_api: Api) -> Api:
    return shared_api


@pytest.mark.parametrize("body", MALFORMED, ids=lambda b: repr(b[:24]))
async def test_a_body_that_is_no_json(api: Api, body: bytes) -> None:
    for path in ("/jobs", "/jobs/estimate"):
        error = error_of(await api.ann.post(path, content=body), 400)
        assert error["code"] == "malformed_json"
        assert len(error["message"]) < 500


@pytest.mark.parametrize(("body", "code", "param"), WRONG, ids=lambda v: str(v)[:50])
async def test_a_spec_that_is_wrong(api: Api, body: str, code: str, param: str | None) -> None:
    answer = await api.ann.post("/jobs", content=body)
    if answer.status_code == 400:
        # Numbers that no machine holds are no JSON for the parser.
        assert error_of(answer, 400)["code"] == "malformed_json"
        return
    error = error_of(answer, 422)
    assert (error["code"], error["param"]) == (code, param)
    assert param is None or param in error["message"]


@pytest.mark.parametrize(
    ("body", "key"),
    [
        ('{"name": "a", "name": "a"}', "name"),
        ('{"lora": {"r": 8, "alpha": 1, "r": 16}}', "r"),
        ('{"name": "a", "\\u006eame": "b", "gpus": 9}', "name"),
        ('{"metadata": {"\\ud800": "a", "\\ud800": "b"}}', "\\ud800"),
        ("{" + '"x": 1,' * 10_000 + '"y": 1}', "x"),
    ],
    ids=lambda v: v[:30],
)
async def test_a_key_that_comes_twice(api: Api, body: str, key: str) -> None:
    for path in ("/jobs", "/jobs/estimate"):
        error = error_of(await api.ann.post(path, content=body), 400)
        assert error["code"] == "malformed_json"
        assert f"'{key}'" in error["message"]


async def test_a_length_is_no_error_of_its_own_where_an_item_is_wrong(api: Api) -> None:
    error = error_of(await api.ann.post("/jobs", json={"exports": ["gguf:q2_k"]}), 422)
    assert error["param"] == "exports.0"
    assert "too short" not in error["message"]
    error = error_of(await api.ann.post("/jobs", json={"exports": [], "lora": {"r": 0}}), 422)
    assert "exports is too short" in error["message"]


async def test_an_error_names_the_limit(api: Api) -> None:
    error = error_of(await api.ann.post("/jobs", json={"lora": {"r": 9999}}), 422)
    assert "lora.r" in error["message"]
    assert "512" in error["message"]


async def test_all_errors_of_a_spec_are_told(api: Api) -> None:
    error = error_of(await api.ann.post("/jobs", json={"lora": {"r": 0}, "nmae": 1, "gpus": 9}), 422)
    assert all(name in error["message"] for name in ("lora.r", "nmae", "gpus"))


async def test_a_spec_of_100_thousand_fields(api: Api) -> None:
    body = json.dumps({f"f{n}": n for n in range(60_000)})
    error = error_of(await api.ann.post("/jobs", content=body), 422)
    assert error["code"] == "unknown_field"
    assert len(error["message"]) < 1000


async def test_the_servers_limits(api: Api) -> None:
    for spec, param in (
        ({"max_samples": api.context.settings.max_samples + 1}, "max_samples"),
        ({"max_seq_length": 9000}, "max_seq_length"),
        (
            {"training": {"per_device_train_batch_size": 256, "gradient_accumulation_steps": 1000}},
            "training.gradient_accumulation_steps",
        ),
        ({"priority": "high"}, "priority"),
    ):
        assert error_of(await api.ann.post("/jobs", json=SPEC | spec), 422)["param"] == param


@pytest.fixture
def untouched(api: Api) -> Iterator[None]:
    """The application has its own context again, whatever the test made of it."""
    context = api.context
    yield
    api.app.state.context = context


@pytest.mark.usefixtures("untouched")
async def test_models_that_can_not_be_used(api: Api, tmp_path: Path) -> None:
    pickled = tmp_path / "models" / "pickled"
    pickled.mkdir(parents=True)
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    context = api.context
    rooted = {"models_root": tmp_path / "models", "model_allow": "local/*"}
    api.app.state.context = replace(context, settings=context.settings.model_copy(update=rooted))
    for model, code in (
        ("local/pickled", "model_unsafe"),
        ("local/absent", "model_not_found"),
        ("owner/elsewhere", "model_not_allowed"),
    ):
        error = error_of(await api.ann.post("/jobs", json={"model": model}), 422)
        assert (error["code"], error["param"]) == (code, "model")
    assert (await api.ann.get("/models")).json()["data"] == []


async def test_a_body_over_the_limit(api: Api) -> None:
    assert error_of(await api.ann.post("/jobs", content=b" " * (2 << 20)), 413)["code"] == "too_large"

    async def endless() -> Any:
        for _ in range(64):
            yield b" " * 65_536

    error_of(await api.ann.post("/jobs", content=endless()), 413)


@pytest.mark.parametrize(
    "job_id",
    ["..", "%2e%2e", "..%2f..%2fetc%2fpasswd", "%00", "ftjob-", "ftjob-%00", "FTJOB-" + "A" * 24, "x" * 5000,
     "ftjob-" + "a" * 23 + "%0a", "file-" + "a" * 24, "%ff", "é"],
)  # fmt: skip
async def test_ids_that_are_none(api: Api, job_id: str) -> None:
    for path in (f"/jobs/{job_id}", f"/jobs/{job_id}/logs", f"/datasets/{job_id}"):
        answer = await api.ann.get(path)
        # A client may resolve `..` itself: then another route answers.
        assert answer.status_code in (200, 404)
        if answer.status_code == 404:
            error_of(answer, 404)
    assert (await api.ann.delete(f"/datasets/{job_id}")).status_code in (404, 405)


@pytest.mark.parametrize(
    ("path", "param", "code"),
    [
        ("/jobs?limit=0", "limit", "out_of_range"),
        ("/jobs?limit=101", "limit", "out_of_range"),
        ("/jobs?limit=ten", "limit", "invalid_type"),
        ("/jobs?after=..", "after", "invalid_value"),
        ("/jobs?after=%00", "after", "invalid_value"),
        ("/jobs?after=ftjob-000000000000000000000000", "after", "invalid_value"),
        ("/jobs?status=done", "status", "invalid_value"),
        ("/jobs?model=%00", "model", "invalid_value"),
        ("/jobs?metadata[a]=%00", "metadata[a]", "invalid_value"),
        ("/jobs?metadata=x", "metadata", "invalid_value"),
        ("/jobs?lmit=5", "lmit", "unknown_parameter"),
        ("/datasets?limit=1000", "limit", "out_of_range"),
        ("/datasets?status=error", "status", "unknown_parameter"),
        ("/models?x=1", "x", "unknown_parameter"),
        ("/jobs/{id}/logs?after=-1", "after", "out_of_range"),
        ("/jobs/{id}/logs?after=99999999999999999999", "after", "out_of_range"),
        ("/jobs/{id}/logs?limit=1001", "limit", "out_of_range"),
        ("/jobs/{id}/logs?wait=31", "wait", "out_of_range"),
        ("/jobs/{id}/logs?wait=nan", "wait", "out_of_range"),
    ],
)
async def test_query_parameters_that_are_wrong(api: Api, path: str, param: str, code: str) -> None:
    job_id = await api.create()
    error = error_of(await api.ann.get(path.replace("{id}", job_id)), 422)
    assert (error["param"], error["code"]) == (param, code)


async def test_routes_and_methods_that_there_are_not(api: Api) -> None:
    assert error_of(await api.ann.get("/nothing"), 404)["code"] == "unknown_route"
    answer = await api.ann.put("/jobs", json={})
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "GET, POST"
    job_id = await api.create()
    for method, path, allowed in (
        ("PUT", f"/jobs/{job_id}", "GET, DELETE"),
        ("POST", f"/jobs/{job_id}/artifacts/adapter.tar", "GET, HEAD"),
        ("GET", f"/jobs/{job_id}/cancel", "POST"),
        ("PATCH", "/datasets", "GET, POST"),
        ("DELETE", "/healthz", "GET"),
        ("POST", "/docs", "GET, HEAD"),
    ):
        answer = await api.ann.request(method, path)
        error_of(answer, 405)
        assert answer.headers["allow"] == allowed
    assert (await api.ann.post("/v1/nothing")).status_code == 404


async def test_an_unexpected_error_tells_nothing_of_the_inside(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> bool:
        raise RuntimeError("secret path /srv/keys")

    monkeypatch.setattr(api.context.doorbell, "ping", broken)
    answer = await api.ann.get("/system")
    error = error_of(answer, 500)
    assert (error["code"], error["type"]) == ("internal_error", "server_error")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] in error["message"]
    assert answer.headers["x-request-id"] in caplog.text
