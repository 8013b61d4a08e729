"""Secrets of owners: in, and never out."""

from __future__ import annotations

import stat

import pytest
from typer.testing import CliRunner

from cli.main import app
from shared.errors import TuneyardError
from shared.repository import secrets
from shared.settings import Settings
from shared.vault import VARIABLES, Vault
from tests.api.conftest import Api, Live, error_of
from tests.conftest import wait_for

pytestmark = pytest.mark.anyio

TOKEN = "hf_secretsecretsecret"


async def test_a_secret_is_set_listed_by_name_and_removed(api: Api) -> None:
    answer = await api.ann.put("/secrets/hub_token", json={"value": TOKEN})
    assert answer.status_code == 200
    assert set(answer.json()) == {"name", "updated_at"}
    listed = await api.ann.get("/secrets")
    assert [row["name"] for row in listed.json()["data"]] == ["hub_token"]
    assert TOKEN not in answer.text + listed.text
    for other in (api.bob, api.root):
        assert (await other.get("/secrets")).json()["data"] == []
        assert error_of(await other.delete("/secrets/hub_token"), 404)["code"] == "secret_not_found"
    assert (await api.ann.delete("/secrets/hub_token")).status_code == 204
    assert (await api.ann.get("/secrets")).json()["data"] == []


@pytest.mark.parametrize(
    "value", ["tiny", "with space in it", "line\nbreak-in-it", "x" * 513, 7, None, "ünicode-token"]
)
async def test_what_can_be_no_secret_is_refused_and_not_repeated(api: Api, value: object) -> None:
    answer = await api.ann.put("/secrets/hub_token", json={"value": value})
    assert error_of(answer, 422)["param"] == "value"
    assert str(value) not in answer.text or value is None
    broken = await api.ann.put("/secrets/hub_token", content=f'{{"value": "{TOKEN}')
    error_of(broken, 400)
    more = await api.ann.put("/secrets/hub_token", json={"value": TOKEN, "x": 1})
    assert error_of(more, 422)["param"] == "x"
    other = await api.ann.put("/secrets/other", json={"value": TOKEN})
    assert error_of(other, 404)["code"] == "secret_not_found"
    assert TOKEN not in broken.text + more.text + other.text


async def test_the_database_has_it_encrypted_under_a_key_that_is_elsewhere(api: Api) -> None:
    await api.ann.put("/secrets/hub_token", json={"value": TOKEN})
    root = api.context.settings.root
    for file in root.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file
    assert stat.S_IMODE((root / "secrets.key").stat().st_mode) == 0o600
    with api.database.read() as session:
        (row,) = secrets.list_secrets(session, "ann")
    vault = Vault(api.context.settings)
    assert vault.open("ann", "hub_token", row.sealed) == TOKEN
    # A row that is moved to another owner, or to another name, stays shut.
    for owner, name in (("bob", "hub_token"), ("ann", "wandb_api_key")):
        with pytest.raises(TuneyardError, match="can't be opened"):
            vault.open(owner, name, row.sealed)
    # Set again, it takes the other's place.
    await api.ann.put("/secrets/hub_token", json={"value": "hf_otherother"})
    with api.database.read() as session:
        (row,) = secrets.list_secrets(session, "ann")
    assert vault.open("ann", "hub_token", row.sealed) == "hf_otherother"


def test_the_key_may_come_from_the_environment(settings: Settings) -> None:
    settings.root.mkdir(parents=True, exist_ok=True)
    given = Settings(data_dir=settings.root, secrets_key="A" * 43 + "=")
    sealed = Vault(given).seal("ann", "hub_token", TOKEN)
    assert not (settings.root / "secrets.key").exists()
    assert Vault(given).open("ann", "hub_token", sealed) == TOKEN
    with pytest.raises(TuneyardError, match="can't be opened"):
        Vault(settings).open("ann", "hub_token", sealed)
    with pytest.raises(TuneyardError, match="TUNEYARD_SECRETS_KEY is no key"):
        Vault(Settings(data_dir=settings.root, secrets_key="c2hvcnQ=")).seal("ann", "hub_token", TOKEN)
    assert "AAAA" not in repr(given) + str(given.model_dump(mode="json"))


def test_every_secret_has_a_variable() -> None:
    assert VARIABLES == {"hub_token": "HF_TOKEN", "wandb_api_key": "WANDB_API_KEY"}


def test_the_commands(live: Live, owner_keys: dict[str, str]) -> None:
    environment = {"TUNEYARD_URL": live.url, "TUNEYARD_API_KEY": live.key}

    def tuneyard(*words: str, given: str = "", key: str = live.key) -> str:
        result = CliRunner().invoke(app, words, input=given, env={**environment, "TUNEYARD_API_KEY": key})
        assert result.exit_code == 0, result.output
        assert TOKEN not in result.output
        return result.output

    tuneyard("secrets", "set", "hub_token", given=TOKEN + "\n")
    assert tuneyard("secrets", "list").startswith("hub_token")
    tuneyard("secrets", "rm", "hub_token")
    assert tuneyard("secrets", "list") == ""
    wait_for(lambda: "DELETE /secrets/{secret}" in tuneyard("audit", key=owner_keys["root"]))
