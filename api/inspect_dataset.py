"""Looks into one data file in a process of its own: `python -m api.inspect_dataset PATH FORMAT`.

Prints one line of JSON, a `Finding`. A file that makes this process fail or starve fails alone.
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from api.services.inspection import inspect

NICENESS = 10
ADDRESS_BYTES = 4 << 30
# What a job can prepare within 1.5 GB must be looked into within it.
MEMORY_BYTES = 1536 << 20


def main(path: str, format_name: str) -> None:
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    sys.stdout.write(inspect(Path(path), format_name).to_json() + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
