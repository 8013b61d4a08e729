"""A PostgreSQL server of the suite's own, from the machine's packages, and databases on it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import suppress
from itertools import count
from pathlib import Path

import psycopg
from sqlalchemy.engine import make_url

from shared.database import Database
from shared.settings import Settings

# Who runs the server where root runs the suite: PostgreSQL refuses root.
SERVANT = "nobody"
MISSING = "PostgreSQL is not installed (Debian: apt-get install postgresql)"
TEMPLATE = "migrated"
OPTIONS = {
    "listen_addresses": "", "max_connections": "200", "shared_buffers": "32MB",
    # Nothing here has to outlive a power cut.
    "fsync": "off",
}  # fmt: skip


def find_program(name: str) -> Path | None:
    """A program of the machine's newest PostgreSQL; Debian keeps the server's own out of the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[-3]))
    named = shutil.which(name)
    return found[-1] if found else Path(named) if named else None


class PostgreSQL:
    """A server that listens on a unix socket in a folder of its own, and on no port."""

    def __init__(self) -> None:
        # None of pytest's folders: root's are closed to the servant, and a socket's path is short.
        self.folder = Path(tempfile.mkdtemp(prefix="ty-pg-"))
        self._user = SERVANT if os.getuid() == 0 else None
        if self._user:
            shutil.chown(self.folder, self._user, pwd.getpwnam(self._user).pw_gid)
        self._numbers = count(1)
        self._pg_ctl("initdb", "-o", "-U postgres --auth=trust -E UTF8 --locale=C --no-sync")
        self.start()
        self._say(f"CREATE DATABASE {TEMPLATE}")
        opened = Database(Settings(database_url=self.url(TEMPLATE)).database())
        opened.migrate()
        opened.close()

    def url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def create(self, template: str = TEMPLATE) -> str:
        """The URL of a new database: with all tables and no rows, or with `template0` without tables."""
        name = f"test_{next(self._numbers)}"
        self._say(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop(self, url: str) -> None:
        """Remove a database, whoever is still connected to it."""
        self._say(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def start(self) -> None:
        options = OPTIONS | {"unix_socket_directories": str(self.folder)}
        told = " ".join(f"-c {name}='{value}'" for name, value in options.items())
        self._pg_ctl("start", "-w", "-l", str(self.folder / "log"), "-o", told)

    def kill(self) -> None:
        """End it at once, without a word to its clients; what was committed is there after the next start."""
        self._pg_ctl("stop", "-m", "immediate")

    @property
    def pid(self) -> int:
        """Of the process that has started all others of it."""
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def close(self) -> None:
        with suppress(subprocess.CalledProcessError):  # It may be down already.
            self.kill()
        shutil.rmtree(self.folder)

    def _say(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    def _pg_ctl(self, *arguments: str) -> None:
        program = find_program("pg_ctl")
        assert program is not None, MISSING
        subprocess.run(
            [str(program), "-s", "-D", str(self.folder / "data"), *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=self.folder,
            user=self._user,
            extra_groups=[] if self._user else None,
        )
