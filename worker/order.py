"""What a supervisor tells the child process that it starts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Order:
    """Which job, under which lease, where to work. One line of JSON on the child's standard input."""

    job_id: str
    token: str
    workdir: str
    settings: dict[str, Any]

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"
