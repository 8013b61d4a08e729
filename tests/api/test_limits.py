"""The rate of a key's requests under `/v1`."""

from __future__ import annotations

import openai
import pytest

from api.limits import RateLimiter
from shared.database import Database
from shared.errors import RateLimited
from shared.settings import Settings
from tests.api.conftest import Api, error_of, serve

pytestmark = pytest.mark.anyio


def test_a_bucket_empties_and_fills_again() -> None:
    now = [0.0]
    limiter = RateLimiter(60, lambda: now[0])
    for left in range(59, -1, -1):
        assert limiter.take(1)["x-ratelimit-remaining-requests"] == str(left)
    with pytest.raises(RateLimited) as caught:
        limiter.take(1)
    assert caught.value.headers["retry-after"] == "1"
    assert caught.value.headers["x-ratelimit-reset-requests"] == "60000ms"
    assert limiter.take(2)["x-ratelimit-remaining-requests"] == "59"
    now[0] = 1.0
    assert limiter.take(1)["x-ratelimit-remaining-requests"] == "0"
    now[0] = 1000.0
    assert limiter.take(1)["x-ratelimit-remaining-requests"] == "59"


def test_no_limit_tells_nothing() -> None:
    assert RateLimiter(0).take(1) == {}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"rate_limit": 3})


async def test_a_key_over_its_rate_is_told_when_to_go_on(api: Api) -> None:
    for left in ("2", "1", "0"):
        answer = await api.ann.get("/v1/models")
        assert answer.headers["x-ratelimit-limit-requests"] == "3"
        assert answer.headers["x-ratelimit-remaining-requests"] == left
        assert answer.headers["x-request-id"]
    refused = await api.ann.get("/v1/models")
    assert error_of(refused, 429)["code"] == "rate_limit_exceeded"
    assert 0 < int(refused.headers["retry-after"]) <= 20
    assert "x-should-retry" not in refused.headers
    # Others, and Tuneyard's own face, are not held up.
    assert (await api.bob.get("/v1/models")).status_code == 200
    assert (await api.ann.get("/models")).status_code == 200


def test_the_official_client_waits_as_long_as_it_is_told(
    settings: Settings, database: Database, owner_keys: dict[str, str]
) -> None:
    def drain() -> None:
        for _ in range(30):
            live.context.limiter.take(1)

    slow = settings.model_copy(update={"rate_limit": 30})
    with (
        serve(slow, database, owner_keys["ann"]) as live,
        openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key, max_retries=1) as client,
    ):
        client.models.list()
        with pytest.raises(RateLimited):
            drain()
        assert client.models.with_raw_response.list().retries_taken == 1
        with pytest.raises(RateLimited):
            drain()
        with pytest.raises(openai.RateLimitError) as caught:
            client.with_options(max_retries=0).models.list()
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"] in ("1", "2")
