"""The OpenAPI schema, by schemathesis: requests that fit it, or nearly, are answered without a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from api.app import create_app
from shared.database import Database
from shared.repository import keys
from shared.settings import Settings
from shared.valkey import EmbeddedValkey
from tests.api.conftest import Live, serve

SCHEMA = schemathesis.openapi.from_dict(create_app(Settings(data_dir=Path("nowhere"))).openapi())
OPERATIONS = {operation.ok().label: operation.ok() for operation in SCHEMA.get_all_operations()}
EXAMPLES = 20
# Meant, though 5xx: no process here answers from models.
UNAVAILABLE = frozenset({"POST /v1/chat/completions", "POST /v1/completions"})


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, valkey: EmbeddedValkey) -> Iterator[Live]:
    """One server for all operations, whose caller may do everything."""
    box = Settings(data_dir=tmp_path_factory.mktemp("schema"), redis_url=valkey.url, max_open_requests=10**6)
    database = Database(box.database())
    database.migrate()
    with database.write() as session:
        key = keys.create_key(session, "root", admin=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with serve(box, database, key) as live:
            yield live
    database.close()


# Health takes nothing that could be wrong.
CASES = [
    (label, mode)
    for label in OPERATIONS
    for mode in GenerationMode
    if not (mode is GenerationMode.NEGATIVE and label in ("GET /healthz", "GET /readyz"))
]


@pytest.mark.parametrize(("label", "mode"), CASES, ids=[f"{label} {mode.value}" for label, mode in CASES])
def test_no_request_breaks_the_server(box: Live, label: str, mode: GenerationMode) -> None:
    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    def send(case: schemathesis.Case) -> None:
        case.query = {**dict(case.query or {}), **({"wait": 0} if label.endswith("/logs") else {})}
        answer = case.call(base_url=box.url, headers=box.headers, timeout=20)
        allowed = {503} if label in UNAVAILABLE else set()
        assert answer.status_code < 500 or answer.status_code in allowed, (
            case.as_curl_command(),
            answer.text,
        )

    send()
