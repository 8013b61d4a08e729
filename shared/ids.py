"""Ids and API keys: random, from the operating system's generator."""

from __future__ import annotations

import base64
import hashlib
import re
import secrets

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
JOB_ID = re.compile(r"ftjob-[0-9a-z]{24}")
DATASET_ID = re.compile(r"file-[0-9a-z]{24}")
UPLOAD_ID = re.compile(r"upload_[0-9a-z]{24}")
WEBHOOK_ID = re.compile(r"we_[0-9a-z]{24}")
KEY_PREFIX = "ty-"


def new_job_id() -> str:
    return "ftjob-" + _random(24)


def new_dataset_id() -> str:
    return "file-" + _random(24)


def new_export_id() -> str:
    return "export-" + _random(24)


def new_upload_id() -> str:
    return "upload_" + _random(24)


def new_part_id() -> str:
    return "part_" + _random(24)


def new_webhook_id() -> str:
    return "we_" + _random(24)


def new_event_id() -> str:
    return "evt_" + _random(24)


def new_webhook_secret() -> str:
    """As Standard Webhooks write it: 32 random bytes in base64."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()


def new_token() -> str:
    """A lease token, which also names the attempt's folders."""
    return _random(20)


def new_api_key() -> str:
    """A key with 40 random characters, about 206 bits."""
    return KEY_PREFIX + _random(40)


def hash_api_key(key: str) -> str:
    """SHA-256, hex. A slow hash would add nothing: the key's 206 bits can't be searched."""
    return hashlib.sha256(key.encode()).hexdigest()


def _random(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))
