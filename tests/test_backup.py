"""The commands of docs/operations.md that back up and restore, as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shared.database import Database
from shared.repository import files, jobs, secrets
from shared.settings import Settings
from shared.storage import Store
from shared.vault import Vault
from tests.conftest import Databases
from tests.postgresql import find_program
from tests.samples import add_dataset, make_job

DOCUMENT = Path(__file__).parents[1] / "docs" / "operations.md"


def commands(heading: str) -> list[str]:
    """The blocks of shell under a heading."""
    part = DOCUMENT.read_text().split(f"\n### {heading}\n")[1].split("\n#")[0]
    return re.findall(r"```bash\n(.*?)```", part, re.DOTALL)


def run(script: str, folder: Path, **environment: str) -> None:
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if program := find_program("pg_dump"):
        paths.insert(0, str(program.parent))
    environment = {**os.environ, **environment, "PATH": os.pathsep.join(paths)}
    done = subprocess.run(
        ["/bin/bash", "-euc", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def fill(database: Database, settings: Settings, tmp_path: Path) -> tuple[str, str]:
    """A job and an uploaded file, and a secret."""
    (tmp_path / "rows.jsonl").write_bytes(b"rows")
    dataset_id = add_dataset(database, settings, tmp_path / "rows.jsonl")
    with database.write() as session:
        secrets.put_secret(session, "ann", "hub_token", Vault(settings).seal("ann", "hub_token", "hf_secret"))
    return make_job(database), dataset_id


def check(settings: Settings, job_id: str, dataset_id: str) -> None:
    opened = Database(settings.database())
    opened.migrate()
    with opened.read() as session:
        assert jobs.get_job(session, job_id, "ann").status == "queued"
        row = files.get_dataset(session, dataset_id, "ann")
        (secret,) = secrets.list_secrets(session, "ann")
    assert b"".join(Store(settings.artifacts()).read(row.key, 0, row.bytes)) == b"rows"
    assert Vault(settings).open("ann", "hub_token", secret.sealed) == "hf_secret"
    opened.close()


def test_sqlite_and_a_local_store_come_back(tmp_path: Path) -> None:
    root = tmp_path / ".tuneyard"
    settings = Settings(data_dir=root)
    root.mkdir(mode=0o700)
    database = Database(settings.database())
    database.migrate()
    job_id, dataset_id = fill(database, settings, tmp_path)
    backup, restore = commands("SQLite and a local store")
    # While the server has it open, and what was written last is in the write-ahead log.
    run(backup, tmp_path, HOME=str(tmp_path))
    database.close()
    shutil.rmtree(root)
    run(restore, tmp_path, HOME=str(tmp_path))
    check(settings, job_id, dataset_id)


@pytest.mark.postgresql(only=True)
def test_postgresql_and_an_s3_compatible_store_come_back(
    databases: Databases, settings: Settings, database: Database, s3_url: str, tmp_path: Path
) -> None:
    settings = settings.model_copy(update={"artifacts_url": s3_url})
    job_id, dataset_id = fill(database, settings, tmp_path)
    backup, restore = commands("PostgreSQL and an S3-compatible store")
    run(
        backup,
        tmp_path,
        TUNEYARD_DATABASE_URL=str(settings.database_url),
        TUNEYARD_ARTIFACTS_URL=s3_url,
    )
    Store(s3_url).delete_tree("datasets")
    assert databases.server is not None
    empty = databases.server.create("template0")
    run(restore, tmp_path, TUNEYARD_DATABASE_URL=empty, TUNEYARD_ARTIFACTS_URL=s3_url)
    check(settings.model_copy(update={"database_url": empty}), job_id, dataset_id)
    databases.drop(empty)
