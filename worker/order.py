"""What a supervisor tells the child process that it starts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Order:
    """Which job, under which lease, where to work. One line of JSON on the child's standard input.

    `gpus` are the numbers, as nvidia-smi has them, of the GPUs that it may use; the process itself sees the
    first of them alone. `export_id` is that of an export to be made; without it the job itself is to be run.
    `reporting` are the environment variables of the reporters that the job names.
    `hub_cache` is the owner's own folder for what its hub token opens, None where all share theirs.
    `store_account` are the variables that the store's account is in.
    `secrets` are the owner's, by the variables of this process's environment that they go into.
    """

    job_id: str
    token: str
    workdir: str
    settings: dict[str, Any]
    gpus: tuple[int, ...] = ()
    export_id: str | None = None
    # Holds credentials: it is neither printed nor logged.
    reporting: dict[str, str] = field(default_factory=dict, repr=False)
    hub_cache: str | None = None
    # By variable. Neither printed nor logged: they are the owner's.
    secrets: dict[str, str] = field(default_factory=dict, repr=False)

    # It is in no environment, for that is passed on to whatever the process starts.
    store_account: dict[str, str] = field(default_factory=dict, repr=False)

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"
