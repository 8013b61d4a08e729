"""The tiny model of the pipeline's tests, for the GPU's."""

from __future__ import annotations

from tests.worker.training.conftest import tiny_model

__all__ = ["tiny_model"]
