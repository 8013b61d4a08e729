"""Caches: what is old or too much goes, what is in use stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from shared.database import Database
from shared.repository import secrets
from shared.settings import Settings
from worker.caches import COMPILED, LOCK, PREPARED, collect_caches, owner_cache
from worker.removed import Removed

DAY = 86_400
USE = """
import sys, pathlib
from worker.caches import use
use(pathlib.Path(sys.argv[1]))
print("used", flush=True)
sys.stdin.read()
"""


@contextmanager
def used(cache: Path) -> Iterator[None]:
    """A process works with the cache."""
    command = [sys.executable, "-c", USE, str(cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "used\n"
        yield
        process.kill()


def age(path: Path, days: float) -> None:
    past = time.time() - days * DAY
    os.utime(path, (past, past))


def fill(folder: Path, days: float, size: int = 100) -> Path:
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"x" * size)
    age(folder / "file", days)
    age(folder, days)
    return folder


def add_owner(database: Database, settings: Settings, owner: str, days: float, size: int = 100) -> Path:
    with database.write() as session:
        secrets.put_secret(session, owner, "hub_token", "sealed")
    folder = fill(owner_cache(settings.root / "cache", owner) / "hub", days, size).parent
    lock = folder.with_name(folder.name + LOCK)
    lock.touch()
    age(lock, days)
    return folder


def run(database: Database, settings: Settings, **limits: float | None) -> list[Removed]:
    """First without doing it: what it says must be what it then does."""
    limited = settings.model_copy(update={"keep_cache_days": None} | limits)
    told = list(collect_caches(database, limited, dry_run=True))
    assert list(collect_caches(database, limited, dry_run=False)) == told
    assert list(collect_caches(database, limited, dry_run=False)) == []
    return told


def test_owners_caches_go_by_age_by_size_and_with_their_token(database: Database, settings: Settings) -> None:
    old, less, young = (add_owner(database, settings, n, d) for n, d in (("ann", 40), ("bob", 9), ("eve", 1)))
    assert run(database, settings) == []
    assert run(database, settings, keep_cache_days=30) == [
        Removed("an owner's cache of the hub", None, "that of ann, used longest ago", 100)
    ]
    assert [path.exists() for path in (old, less, young)] == [False, True, True]
    run(database, settings, owner_cache_bytes=150)
    assert [path.exists() for path in (less, young)] == [False, True]
    with database.write() as session:
        secrets.delete_secret(session, "eve", "hub_token")
    (removed,) = run(database, settings)
    assert removed.why == "its owner has no hub token any more"
    assert [path.suffix for path in young.parent.iterdir()] == [LOCK] * 3


def test_an_owners_cache_in_use_stays_and_counts_as_used_now(database: Database, settings: Settings) -> None:
    cache = add_owner(database, settings, "ann", 40)
    limits = {"keep_cache_days": 30, "owner_cache_bytes": 0}
    with used(cache):
        lock = cache.with_name(cache.name + LOCK)
        age(lock, 40)
        assert run(database, settings, **limits) == []
        assert time.time() - lock.stat().st_mtime < DAY
    assert run(database, settings, keep_cache_days=30) == []
    assert len(run(database, settings, **limits)) == 1


def test_prepared_data_goes_by_age_but_not_from_under_a_job(database: Database, settings: Settings) -> None:
    shared = settings.root / "cache" / "data"
    mine = add_owner(database, settings, "ann", 1) / PREPARED
    for root in (shared, mine):
        fill(root / "old", 40)
        fill(root / "new", 2)
    with filelock.FileLock(shared / "old.lock"):
        (removed,) = run(database, settings, keep_cache_days=30)
    assert (removed.what, removed.why, removed.bytes) == ("prepared data", "old", 100)
    assert sorted(path.name for path in mine.iterdir() if path.is_dir()) == ["new"]
    assert len(run(database, settings, data_cache_bytes=50)) == 3


def test_compiled_kernels_go_by_age_and_size_while_no_job_has_them(
    database: Database, settings: Settings
) -> None:
    cache = settings.root / "cache" / COMPILED
    for days in (40, 3, 1, 2):
        fill(cache / "inductor" / f"{days}", days)
    with used(cache):
        assert run(database, settings, keep_cache_days=30) == []
    assert [removed.bytes for removed in run(database, settings, keep_cache_days=30)] == [100]
    assert run(database, settings, compile_cache_bytes=300) == []
    run(database, settings, compile_cache_bytes=250)
    assert sorted(path.name for path in cache.glob("inductor/*")) == ["1", "2"]


def test_copies_of_models_that_a_killed_process_left_go(database: Database, settings: Settings) -> None:
    folder = fill(settings.root / "cache" / "inference", 0)
    with filelock.FileLock(settings.root / "inference.lock"):
        assert run(database, settings) == []
    assert [removed.bytes for removed in run(database, settings)] == [100]
    assert not folder.exists()
