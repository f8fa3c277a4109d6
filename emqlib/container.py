"""A file of tensors that is read without running anything: safetensors for numbers, JSON for what they mean."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from . import checks
from .files import canonical_json, write_atomic

_DTYPES = {torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32"}
_DTYPES |= {torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_DTYPES |= {torch.float64: "F64"}


def write(path: Path, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write tensors of any shape and what is said `about` them, of JSON's types, to `path`, atomically.

    The header holds a checksum of both. The library's own writer takes a copy of all tensors, or a temporary file of
    its own, which a killed process leaves behind, and hides what the disk said. OSError: it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    told = canonical_json(about)
    metadata = {"emqlib": told, "sha256": _digest(told, tensors)}
    write_atomic(path, lambda file: _write(file, metadata, tensors))


def _write(file: BinaryIO, metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(_bytes(tensor))


def read(path: Path, version: int, expected: str, name: str = "path") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` was given: `about`, whose "version" is this one, and the tensors, on the CPU.

    ValueError, which calls the file `name`: no such file, not whole, changed, or of another version.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            about = json.loads(metadata["emqlib"])
            names = file.keys()
            tensors = {key: file.get_tensor(key) for key in names}
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:  # of PyTorch: a shape
        raise checks.invalid(name, str(path), f"{expected} ({error})") from error
    found = about.get("version") if isinstance(about, dict) else None
    if found != version:
        raise checks.invalid(name, str(path), f"{expected}, of version {version} of the format, not {found!r}")
    if metadata.get("sha256") != _digest(metadata["emqlib"], tensors):
        raise checks.invalid(name, str(path), f"{expected}: it is not what was saved, its checksum differs")
    return about, tensors


def _digest(told: str, tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(told.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(_bytes(tensor))
    return sha.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def flattened(tree: Any, tensors: dict[str, Tensor], at: str = "") -> Any:
    """`tree`, of dicts, lists, tuples, tensors, numbers, texts and None, for JSON; its tensors go to `tensors`."""
    if isinstance(tree, Tensor):
        name = f"{len(tensors)}: {at}"  # of its own, whatever the keys are
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[key, flattened(value, tensors, f"{at}.{key}".strip("."))] for key, value in tree.items()]}
    if isinstance(tree, (list, tuple)):
        return {type(tree).__name__: [flattened(v, tensors, f"{at}.{i}".strip(".")) for i, v in enumerate(tree)]}
    return tree


def restored(told: Any, tensors: dict[str, Tensor]) -> Any:
    """What `flattened` was given."""
    if not isinstance(told, dict):
        return told
    ((kind, value),) = told.items()
    if kind == "tensor":
        return tensors[value]
    items: Iterator[Any] = (restored(item, tensors) for item in value)
    if kind == "dict":
        return {key: restored(item, tensors) for key, item in value}
    return tuple(items) if kind == "tuple" else list(items)
