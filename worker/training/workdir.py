"""The folders and files that one attempt at a job works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workdir:
    """Where one attempt works.

    `root` is the attempt's own folder, `cache` is shared by all jobs of the box (converted bundled
    models, prepared data).
    `dataset_file` is the uploaded file of a `file` dataset, `model_dir` the folder of a `local/NAME` model;
    the caller has resolved and checked both.
    """

    root: Path
    cache: Path
    dataset_file: Path | None = None
    model_dir: Path | None = None
