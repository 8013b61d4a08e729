"""The database that a command works on by itself, without a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import SQLAlchemyError

from shared.database import Database
from shared.errors import TuneyardError
from shared.settings import Settings, ensure_private_dir


@contextmanager
def database_errors() -> Iterator[None]:
    """Within this, what is wrong with the database is told in one line.

    Raises:
        TuneyardError: it can't be used.
    """
    try:
        yield
    except SQLAlchemyError as error:
        raise TuneyardError(f"The database can't be used: {str(error).splitlines()[0]}") from error


@contextmanager
def opened_database(settings: Settings) -> Iterator[Database]:
    """The settings' database, brought up to date.

    Raises:
        TuneyardError: it can't be used.
    """
    ensure_private_dir(settings.root)
    with database_errors():
        database = Database(settings.database())
        try:
            database.migrate()
            yield database
        finally:
            database.close()
