"""The folders and files that one attempt at a job works with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from worker.training.data_cache import DEFAULT_BYTES


@dataclass(frozen=True)
class Workdir:
    """Where one attempt works.

    `root` is the attempt's own folder, `cache` is shared by all jobs of the box (converted bundled
    models, and prepared data up to `prepared_bytes`).
    `data_cache` is where prepared data is kept, None for the one in `cache` that all owners share.
    `gpus` are the numbers of the job's GPUs, as nvidia-smi has them, where it runs on several.
    `dataset_file` and `validation_file` are the uploaded files of `file` datasets, `model_dir` the folder of
    a `local/NAME` model; the caller has resolved and checked them. `store` is the folder where the job's
    finished files go, which may not be there yet; None where that is on no disk of this machine. With
    `copies` the newest checkpoint goes there too.
    `gpu_memory_fraction` is the share of each GPU's memory that the attempt may take.
    """

    root: Path
    cache: Path
    dataset_file: Path | None = None
    model_dir: Path | None = None
    validation_file: Path | None = None
    prepared_bytes: int = DEFAULT_BYTES
    store: Path | None = None
    copies: bool = False
    gpu_memory_fraction: float = 1
    gpus: tuple[int, ...] = ()
    data_cache: Path | None = None
