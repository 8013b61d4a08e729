"""One `Settings` is built at entry from the environment and passed down."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from shared.errors import TuneyardError

# A unix socket's address holds 107 bytes and a NUL.
MAX_SOCKET_PATH = 107
# A lease lasts for so many looks of a worker into the database at the least.
LEASE_POLLS = 4
# Which engines' stacks are kept imported: that of the last job, none, or those named.
STANDBY = r"^(auto|off|(reference|compiled|unsloth)(,(reference|compiled|unsloth)){0,2})$"


class Settings(BaseSettings):
    """Settings from `TUNEYARD_…` variables. Sizes in bytes, times in seconds, lists separated by commas."""

    model_config = SettingsConfigDict(env_prefix="TUNEYARD_", frozen=True)

    data_dir: Path = Path("~/.tuneyard")
    database_url: str | None = None
    redis_url: str | None = None
    artifacts_url: str | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    models_root: Path | None = None
    model_allow: str = "*"
    dataset_allow: str = "*"
    allowed_hosts: str = ""
    allowed_origins: str = ""
    trusted_proxies: str = ""
    secrets_key: Annotated[SecretStr | None, Field(repr=False)] = None
    audit_days: Annotated[float, Field(gt=0, le=36_500)] = 365

    max_samples: Annotated[int, Field(ge=1)] = 1_000_000
    max_seq_length: Annotated[int, Field(ge=16)] = 131_072
    max_effective_batch: Annotated[int, Field(ge=1)] = 4096
    max_queued_jobs: Annotated[int, Field(ge=1)] = 100
    max_running_jobs: Annotated[int, Field(ge=1)] | None = None
    max_gpu_hours: Annotated[float, Field(ge=0)] | None = None
    max_stored_bytes: Annotated[int, Field(ge=0)] | None = None
    rate_limit: Annotated[int, Field(ge=0)] = 6000
    max_open_requests: Annotated[int, Field(ge=1)] = 256
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1 << 20
    max_upload_bytes: Annotated[int, Field(ge=1)] = 10 << 30
    inline_inspect_bytes: Annotated[int, Field(ge=0)] = 4 << 20

    webhook_allow: str = "*"
    webhook_private: bool = False
    webhook_retry_seconds: Annotated[float, Field(gt=0)] = 5

    data_cache_bytes: Annotated[int, Field(ge=0)] = 50 << 30
    compile_cache_bytes: Annotated[int, Field(ge=0)] = 10 << 30
    owner_cache_bytes: Annotated[int, Field(ge=0)] | None = None
    keep_cache_days: Annotated[float, Field(ge=0)] | None = 30

    keep_checkpoint_days: Annotated[float, Field(ge=0)] | None = 30
    keep_last_checkpoints: Annotated[int, Field(ge=1)] | None = None
    keep_checkpoint_bytes: Annotated[int, Field(ge=0)] | None = None
    keep_artifact_days: Annotated[float, Field(ge=0)] | None = None
    keep_artifact_jobs: Annotated[int, Field(ge=1)] | None = None
    keep_log_days: Annotated[float, Field(ge=0)] | None = None
    keep_log_entries: Annotated[int, Field(ge=1)] | None = None
    keep_unfinished_hours: Annotated[float, Field(ge=1)] = 24

    standby: Annotated[str, Field(pattern=STANDBY)] = "auto"

    inference_models: Annotated[int, Field(ge=0)] = 2
    inference_memory_bytes: Annotated[int, Field(ge=1)] = 8 << 30
    inference_context_bytes: Annotated[int, Field(ge=1)] = 1 << 30
    inference_gpu: Literal["off", "idle"] = "off"
    inference_idle_seconds: Annotated[float, Field(gt=0)] = 300
    inference_request_seconds: Annotated[float, Field(gt=0)] = 300
    inference_requests: Annotated[int, Field(ge=1)] = 16
    inference_owner_requests: Annotated[int, Field(ge=1)] = 4

    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 1
    busy_gpu_wait_seconds: Annotated[float, Field(ge=0)] = 3600

    preemption: bool = False
    store_checkpoints: Literal["auto", "on", "off"] = "auto"

    poll_seconds: Annotated[float, Field(gt=0)] = 2
    lease_seconds: Annotated[float, Field(ge=2, validate_default=True)] = 30
    stop_grace_seconds: Annotated[float, Field(gt=0)] = 2.5
    checkpoint_grace_seconds: Annotated[float, Field(gt=0)] = 60
    retry_seconds: Annotated[float, Field(gt=0)] = 10
    max_losses: Annotated[int, Field(ge=1)] = 3

    @field_validator("lease_seconds")
    @classmethod
    def _outlasts_a_look(cls, lease: float, info: ValidationInfo) -> float:
        # One that slept for half a lease takes it that the whole machine did, and takes nothing for lost.
        poll = info.data.get("poll_seconds", 0)
        if lease < LEASE_POLLS * poll:
            raise ValueError(f"must be at least {LEASE_POLLS} times TUNEYARD_POLL_SECONDS, which is {poll:g}")
        return lease

    @property
    def root(self) -> Path:
        return self.data_dir.expanduser().absolute()

    @property
    def local_key_file(self) -> Path:
        return self.root / "local.key"

    @property
    def server_url_file(self) -> Path:
        """Where `serve` writes its address, for the CLI on the same box."""
        return self.root / "server.url"

    def database(self) -> str:
        """SQLAlchemy URL of the database."""
        if self.database_url is None:
            return f"sqlite:///{self.root / 'tuneyard.db'}"
        # Common spellings of the same server; psycopg is the driver that the extra installs.
        for prefix in ("postgres://", "postgresql://"):
            if self.database_url.startswith(prefix):
                return "postgresql+psycopg://" + self.database_url.removeprefix(prefix)
        return self.database_url

    def artifacts(self) -> str:
        """fsspec URL under which datasets and artifacts are kept."""
        return self.artifacts_url or (self.root / "artifacts").as_uri()

    def redis(self) -> str:
        """URL of the Redis that every process of this box talks to."""
        return self.redis_url or f"unix://{self.valkey_socket()}"

    def valkey_socket(self) -> Path:
        """Where the embedded Valkey listens."""
        return self._socket("valkey.sock")

    def inference_socket(self) -> Path:
        """Where `tuneyard inference` listens."""
        return self._socket("inference.sock")

    def _socket(self, name: str) -> Path:
        """A unix socket's path: in the data folder, or elsewhere if that path is too long."""
        inside = self.root / "run" / name
        if len(os.fsencode(inside)) <= MAX_SOCKET_PATH:
            return inside
        base = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:12]
        return base / f"tuneyard-{os.getuid()}-{digest}" / name

    def model_allowed(self, model: str) -> bool:
        return matches(self.model_allow, model)

    def dataset_allowed(self, dataset: str) -> bool:
        return matches(self.dataset_allow, dataset)


def matches(patterns: str, value: str) -> bool:
    """Whether a comma-separated list of shell patterns (`*`, `?`) covers the value, case and all."""
    return any(fnmatch.fnmatchcase(value, p.strip()) for p in patterns.split(",") if p.strip())


def ensure_private_dir(path: Path) -> None:
    """Make the folder with mode 0700, or make sure that the one there is ours alone.

    Raises:
        TuneyardError: somebody else owns it, it is a link, or others may enter it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        if path.is_symlink() or not path.is_dir() or found.st_uid != os.getuid():
            raise TuneyardError(
                f"{path} belongs to somebody else or is no folder: remove it or set TUNEYARD_DATA_DIR."
            ) from None
        path.chmod(0o700)
