"""Stands in for `api.inspect_dataset`: its finding is what it sees of the environment."""

from __future__ import annotations

import os
import sys

from api.services.inspection import Finding

if __name__ == "__main__":
    sys.stdout.write(Finding("text", dict(os.environ)).to_json() + "\n")
