from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.errors import TuneyardError
from shared.settings import MAX_SOCKET_PATH, Settings, ensure_private_dir, matches


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TUNEYARD_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TUNEYARD_MAX_SAMPLES", "7")
    monkeypatch.setenv("TUNEYARD_PORT", "9000")
    settings = Settings()
    assert (settings.root, settings.max_samples, settings.port) == (tmp_path, 7, 9000)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"lease_seconds": 1}, "greater than or equal to 2"),
        ({"lease_seconds": 7}, "at least 4 times TUNEYARD_POLL_SECONDS, which is 2"),
        ({"poll_seconds": 10}, "which is 10"),
        ({"lease_seconds": 8}, None),
        ({"lease_seconds": 2, "poll_seconds": 0.5}, None),
    ],
)
def test_a_lease_outlasts_some_looks(settings: dict[str, float], refused: str | None) -> None:
    if refused is None:
        assert Settings.model_validate(settings)
        return
    with pytest.raises(ValidationError, match=refused) as caught:
        Settings.model_validate(settings)
    assert caught.value.errors()[0]["loc"] == ("lease_seconds",)


def test_defaults_are_a_folder_sqlite_and_an_embedded_valkey(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert settings.database() == f"sqlite:///{tmp_path}/tuneyard.db"
    assert settings.artifacts() == f"file://{tmp_path}/artifacts"
    assert settings.redis() == f"unix://{tmp_path}/run/valkey.sock"


@pytest.mark.parametrize("url", ["postgres://u@h/d", "postgresql://u@h/d"])
def test_postgresql_urls_get_the_driver_that_is_installed(url: str) -> None:
    assert Settings(database_url=url).database() == "postgresql+psycopg://u@h/d"


def test_a_long_data_folder_has_a_short_socket_path(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    one, two = Settings(data_dir=deep), Settings(data_dir=deep / "x")
    paths = {one.valkey_socket(), two.valkey_socket(), one.inference_socket(), two.inference_socket()}
    assert len(paths) == 4
    assert all(len(os.fsencode(path)) <= MAX_SOCKET_PATH for path in paths)


def test_a_private_folder_is_made_closed_and_an_open_one_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    ensure_private_dir(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    ensure_private_dir(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_link_is_not_taken_for_a_private_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(TuneyardError, match="belongs to somebody else"):
        ensure_private_dir(tmp_path / "link")


@pytest.mark.parametrize(
    ("patterns", "value", "covered"),
    [
        ("*", "any/thing", True),
        ("nvidia/*, bundled/*", "nvidia/x", True),
        ("nvidia/*, bundled/*", "Nvidia/x", False),
        ("", "nvidia/x", False),
        ("nvidia/x", "nvidia/xy", False),
    ],
)
def test_allow_lists_are_shell_patterns(patterns: str, value: str, covered: bool) -> None:
    assert matches(patterns, value) is covered
