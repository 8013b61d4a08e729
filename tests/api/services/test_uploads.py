"""Names of uploads, and what interrupted ones leave behind."""

from __future__ import annotations

import pytest

from api.services.uploads import display_name


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("a\x00b\x01c\x7f.jsonl", "abc.jsonl"),
        ("a\r\nSet-Cookie: x", "aSet-Cookie: x"),
        ("\u202egnp.exe", "gnp.exe"),
        ("../..\\x", "x"),
        ("\x00", "unnamed"),
        ("  ", "unnamed"),
    ],
)
def test_a_name_is_only_ever_shown(given: str, shown: str) -> None:
    assert display_name(given) == shown
