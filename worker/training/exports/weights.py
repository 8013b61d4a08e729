"""Safetensors files, read and written a piece at a time: a model's size never decides over the memory.

The format: eight bytes with the length of the header, the header (JSON: name, dtype, shape, and where the
tensor's bytes are), then the bytes. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

from shared.models import MAX_HEADER_BYTES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip
PIECE_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `start` is where its first byte is, `dtype` the format's own name (`BF16`)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a model folder, by name, in the order of the files.

    Raises:
        ValueError: a file or the index is damaged.
        OSError: one is not there.
    """
    if (folder / INDEX).is_file():
        names: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(names.values()))
        if any(Path(file).name != file for file in files):
            raise ValueError(f"{INDEX} names files outside its folder")
        found = {t.name: t for file in files for t in _read_header(folder / file)}
        return {name: tensor for name, tensor in found.items() if names.get(name) == tensor.file.name}
    return {t.name: t for t in _read_header(folder / SINGLE)}


def read_pieces(tensor: Stored) -> Iterator[Any]:
    """The tensor's rows as torch tensors of its dtype and at most about `PIECE_BYTES`, in order."""
    import torch

    dtype = torch_dtype(tensor.dtype)
    row = tensor.bytes // tensor.shape[0] if tensor.shape and tensor.shape[0] else tensor.bytes
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, PIECE_BYTES // max(row, 1))
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        for at in range(0, rows, step):
            count = min(step, rows - at)
            buffer = bytearray(count * row)
            _fill(stream, memoryview(buffer))
            shape = (count, *tensor.shape[1:]) if tensor.shape else ()
            flat = torch.frombuffer(buffer, dtype=dtype) if buffer else torch.empty(0, dtype=dtype)
            yield flat.reshape(shape)


def write_shards(
    folder: Path,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    pieces: Callable[[str], Iterator[Any]],
    shard_bytes: int,
) -> None:
    """Write tensors into one file, or into several of at most `shard_bytes` with their index.

    Args:
        tensors: dtype and shape of each, by name.
        pieces: gives a tensor's values in order, in pieces of any size.
    """
    sizes = {name: ITEM_BYTES[dtype] * prod(shape) for name, (dtype, shape) in tensors.items()}
    # Wider types first keep every tensor aligned to its own width.
    order = sorted(tensors, key=lambda name: -ITEM_BYTES[tensors[name][0]])
    shards: list[list[str]] = [[]]
    for name in order:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        _write_file(folder / SINGLE, {name: tensors[name] for name in order}, pieces)
        return
    where: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / file, {name: tensors[name] for name in names}, pieces)
        where |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def torch_dtype(name: str) -> Any:
    """`BF16` -> `torch.bfloat16`."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
        "U8": torch.uint8, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
        "BOOL": torch.bool,
    }[name]  # fmt: skip


def _read_header(file: Path) -> list[Stored]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 0 < length <= MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} is no safetensors file")
        header = json.loads(stream.read(length))
    size = file.stat().st_size - 8 - length
    found = []
    for name, told in header.items():
        if name == "__metadata__":
            continue
        begin, end = told["data_offsets"]
        shape = tuple(told["shape"])
        width = ITEM_BYTES.get(told["dtype"])
        if not 0 <= begin <= end <= size or (width and width * prod(shape) != end - begin):
            raise ValueError(f"{name} in {file.name} has no such size")
        found.append(Stored(name, file, told["dtype"], shape, 8 + length + begin, end - begin))
    return sorted(found, key=lambda t: t.start)


def _fill(stream: FileIO, view: memoryview) -> None:
    while view:
        count = stream.readinto(view)
        if not count:
            raise ValueError("a safetensors file ends early")
        view = view[count:]


def _write_file(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], pieces: Callable[[str], Iterator[Any]]
) -> None:
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        end = at + ITEM_BYTES[dtype] * prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            for piece in pieces(name):
                flat = piece.contiguous().reshape(-1)
                stream.write(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
    if path.stat().st_size != 8 + len(text) + at:
        raise ValueError(f"{path.name} was not written whole")
