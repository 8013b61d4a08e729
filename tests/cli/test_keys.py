"""`tuneyard keys` as a command, on the database alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from cli.main import app
from shared.database import Database
from shared.errors import Unauthorized
from shared.ids import hash_api_key
from shared.repository import audit, keys, owners
from shared.settings import Settings
from tests.cli.command import run_command


@pytest.fixture
def box(settings: Settings, database: Database) -> dict[str, str]:
    """The environment of a box whose database is the test's."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TUNEYARD_")}
    environment["TUNEYARD_DATA_DIR"] = str(settings.root)
    environment["TUNEYARD_DATABASE_URL"] = settings.database()
    return environment


def test_a_key_is_made_shown_once_listed_and_revoked(box: dict[str, str], database: Database) -> None:
    made = run_command(box, "keys", "create", "ann")
    assert made.returncode == 0
    key = made.stdout.splitlines()[-1]
    assert key.startswith("ty-")
    with database.read() as session:
        row = keys.find_key(session, key)
        assert (row.name, row.admin, row.key_hash) == ("ann", False, hash_api_key(key))
    listed = run_command(box, "keys", "list").stdout
    assert "ann" in listed
    assert key not in listed
    assert run_command(box, "keys", "revoke", str(row.id)).returncode == 0
    with pytest.raises(Unauthorized, match="revoked"), database.read() as session:
        keys.find_key(session, key)
    assert "revoked" in run_command(box, "keys", "list").stdout


def test_an_admin_key_is_one(box: dict[str, str], database: Database) -> None:
    key = run_command(box, "keys", "create", "root", "--admin").stdout.splitlines()[-1]
    with database.read() as session:
        assert keys.find_key(session, key).admin


def test_a_key_may_be_for_high_priority(box: dict[str, str], database: Database) -> None:
    key = run_command(box, "keys", "create", "ann", "--high").stdout.splitlines()[-1]
    with database.read() as session:
        found = keys.find_key(session, key)
    assert (found.admin, found.high) == (False, True)


def test_quotas_of_an_owner(
    box: dict[str, str], database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in box.items():
        monkeypatch.setenv(name, value)

    def limits() -> list[float | None]:
        with database.read() as session:
            found = owners.quotas(session, settings, "ann")
        assert found["queued_exports"].limit == found["queued_jobs"].limit
        return [quota.limit for quota in found.values() if quota.name != "queued_exports"]

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["keys", "quota", "ann", *arguments])

    assert "unlimited" in run().output
    run("--queued-jobs", "5", "--running-jobs", "2", "--gpu-hours", "1.5", "--stored-bytes", "unlimited")
    assert limits() == [5, 2, 1.5, None]
    assert "1.5" in run("--queued-jobs", "default").output
    assert limits() == [settings.max_queued_jobs, 2, 1.5, None]
    for wrong in ("-3", "many", str(2**31), "nan"):
        assert "no number from 0" in str(run("--running-jobs", wrong).exception)


def test_the_key_itself_is_nowhere_on_disk(box: dict[str, str], settings: Settings) -> None:
    key = run_command(box, "keys", "create", "ann").stdout.splitlines()[-1]
    held = [p for p in Path(settings.root).rglob("*") if p.is_file() and key.encode() in p.read_bytes()]
    assert held == []


@pytest.mark.parametrize("name", ["", "../x", "a b", "-x", "x" * 101, "a\nb"])
def test_an_owner_has_a_plain_name(box: dict[str, str], name: str) -> None:
    refused = run_command(box, "keys", "create", "--", name)
    assert refused.returncode != 0
    assert "NAME is 1 to 100" in refused.stderr


def test_revoking_what_is_not_there_says_so_in_one_line(box: dict[str, str]) -> None:
    refused = run_command(box, "keys", "revoke", "77")
    assert refused.returncode == 1
    assert refused.stderr.strip() == "Error: No API key 77: `tuneyard keys list` shows their numbers."


def test_keys_are_in_the_audit_log(box: dict[str, str], database: Database) -> None:
    runner = CliRunner()
    key = runner.invoke(app, ["keys", "create", "ann", "--admin"], env=box).stdout.splitlines()[-1]
    assert runner.invoke(app, ["keys", "revoke", "1"], env=box).exit_code == 0
    with database.read() as session:
        rows, more = audit.list_entries(session, None, None, 10)
    assert [(row.action, row.object) for row in rows] == [
        ("keys revoke", "ann/1"),
        ("keys create --admin", "ann"),
    ]
    assert not more
    assert {row.owner for row in rows} == {f"box:{os.getuid()}"}
    assert key not in str(rows)
