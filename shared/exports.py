"""What the files of an export are called."""

from __future__ import annotations


def artifact_name(kind: str, checkpoint: int | None = None) -> str:
    """`gguf:q4_k_m` -> `model-q4_k_m.gguf`, or `model-q4_k_m.step-500.gguf` from the checkpoint of step 500.

    Args:
        kind: an export format, or `modelfile`.
    """
    step = f".step-{checkpoint}" if checkpoint is not None else ""
    if kind == "modelfile":
        return f"Modelfile{step}"
    if kind.startswith("gguf:"):
        return f"model-{kind.removeprefix('gguf:')}{step}.gguf"
    return f"{kind}{step}.tar"


def export_words(kind: str, checkpoint: int | None) -> str:
    """`gguf:q4_k_m`, or `gguf:q4_k_m of step 500`, for messages."""
    return kind if checkpoint is None else f"{kind} of step {checkpoint}"
