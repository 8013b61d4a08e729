"""`tuneyard serve` as its user starts it: a real process tree on a free port."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import wait_for

READY = re.compile(
    r'Tuneyard is ready at (http://\S+) - try: curl -H "Authorization: Bearer \$\(cat (\S+)\)" '
)


class Served:
    """A running `serve` and what it said."""

    def __init__(self, folder: Path, database_url: str | None, *arguments: str, **more: str) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TUNEYARD_")}
        if database_url:
            environment["TUNEYARD_DATABASE_URL"] = database_url
        # What each of these would import at its start, and hardly any would use.
        environment |= {"TUNEYARD_STANDBY": "off", **more}
        self.folder = folder
        self.errors = folder.parent / f"{folder.name}.err"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "cli.main",
                    "serve",
                    "--port",
                    "0",
                    "--data-dir",
                    str(folder),
                    *arguments,
                ],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def ready(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = READY.match(line)
        assert found, f"{line!r}; {self.errors.read_text()}"
        assert Path(found[2]) == self.folder / "local.key"
        return found[1]

    def parts(self) -> dict[str, psutil.Process]:
        """The children by what they are."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error, IndexError):  # it ends or starts at this moment
                command = child.cmdline()
                found["valkey" if "valkey" in command[0] else command[3]] = child
        return found

    def get(self, url: str, path: str) -> httpx.Response:
        key = (self.folder / "local.key").read_text().strip()
        return httpx.get(f"{url}{path}", headers={"Authorization": f"Bearer {key}"}, timeout=5)

    def answers(self, url: str, path: str) -> bool:
        try:
            return self.get(url, path).is_success
        except httpx.TransportError:
            return False


@pytest.fixture
def served(tmp_path: Path, database_url: str | None) -> Iterator[Served]:
    running = Served(tmp_path / "data", database_url)
    yield running
    clear_away(running)


def clear_away(served: Served) -> None:
    # A `serve` that is killed leaves its Valkey to the next one, of which there is none.
    left = served.parts() if served.process.poll() is None else {}
    served.process.kill()
    served.process.wait()
    if "valkey" in left:
        left["valkey"].kill()
    if served.process.stdout is not None:
        served.process.stdout.close()


def check_that_all_stops(served: Served, number: signal.Signals) -> None:
    parts = served.parts()
    assert set(parts) == {"valkey", "api", "worker", "inference"}
    served.process.send_signal(number)
    assert served.process.wait(20) == 0
    assert not any(part.is_running() for part in parts.values())
    assert served.process.stdout is not None
    assert served.process.stdout.read() == ""
    assert "Traceback" not in served.errors.read_text()


def test_it_says_one_line_when_ready_and_stops_with_everything_it_started(served: Served) -> None:
    url = served.ready()
    assert served.get(url, "/jobs").json()["data"] == []
    assert wait_for(lambda: served.get(url, "/system").json()["workers"])
    check_that_all_stops(served, signal.SIGINT)


def test_what_dies_is_brought_back_and_when_serve_is_killed_the_next_start_is_clean(
    served: Served, tmp_path: Path, database_url: str | None
) -> None:
    url = served.ready()
    before = served.parts()
    for part in before.values():
        part.kill()
    wait_for(lambda: set(served.parts()) == set(before) and served.answers(url, "/readyz"))
    parts = served.parts()
    assert {p.pid for p in parts.values()}.isdisjoint({p.pid for p in before.values()})
    assert wait_for(lambda: served.get(url, "/system").json()["workers"])
    served.process.kill()
    served.process.wait()
    assert wait_for(lambda: not any(parts[name].is_running() for name in ("api", "worker", "inference")))
    again = Served(tmp_path / "data", database_url)
    try:
        again.ready()
        assert wait_for(lambda: not parts["valkey"].is_running())
        check_that_all_stops(again, signal.SIGTERM)
    finally:
        clear_away(again)


def refused(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_wildcard_is_told_as_an_address_that_answers_the_key_is_private_and_a_second_harms_nothing(
    tmp_path: Path,
) -> None:
    served = Served(
        tmp_path / "data",
        None,
        "--host",
        "0.0.0.0",
        "--no-worker",
        HTTP_PROXY="http://127.0.0.1:1",
        TUNEYARD_INFERENCE_MODELS="0",
    )
    try:
        url = served.ready()
        assert set(served.parts()) == {"valkey", "api"}
        assert url.startswith("http://127.0.0.1:")
        assert (served.folder / "local.key").stat().st_mode & 0o777 == 0o600
        assert served.folder.stat().st_mode & 0o777 == 0o700
        port = url.rsplit(":", 1)[1]
        same_port = refused("--port", port, "--data-dir", str(tmp_path / "other"))
        assert f"Can't listen on 127.0.0.1:{port}" in same_port
        assert "Another `tuneyard serve`" in refused("--port", "0", "--data-dir", str(served.folder))
        assert served.answers(url, "/jobs")
        assert (served.folder / "server.url").read_text().strip() == url
        served.process.terminate()
        assert served.process.wait(20) == 0
    finally:
        clear_away(served)
