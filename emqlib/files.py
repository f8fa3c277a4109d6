"""Files that are either whole or absent, files of tensors that run no code, and what made them."""

import glob
import hashlib
import json
import os
import platform
import subprocess
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torchvision
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from . import checks

CHECKOUT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder that `data/`, `results/` and `build/` lie in by default, whatever folder a notebook is run from.

    The checkout this package lies in, or the working directory where it was installed without one.
    """
    return CHECKOUT if (CHECKOUT / "pyproject.toml").exists() else Path.cwd()


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it to `path`.

    Whoever reads `path`, at any moment and after any crash, finds the old file or the new one, never a part. If the
    folder cannot be written to, or the disk is full, an OSError names `path` and nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes it private, but results are there to be shared
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say whose it is
        raise


def can_hold_files(folder: Path) -> bool:
    """Whether files can be written to `folder`, which is there or can be made."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    return there.is_dir() and os.access(there, os.W_OK)


class Busy(RuntimeError):
    """Another process is at work on a file, which only one may write."""


@contextmanager
def alone(path: Path, patience: float = 0) -> Iterator[None]:
    """Within the block no other process is in such a block for `path`; a process that was killed no longer counts.

    Parts of the file that a killed process left behind are removed. The same thread may enter again within the block.
    It waits up to `patience` seconds, or without limit if -1, for another process to leave, and then raises Busy.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise Busy(f"{path}: another process is at work on it") from None
    try:
        remove_parts(path)
        yield
    finally:
        lock.release()


def remove_parts(path: Path) -> None:
    """Remove what killed processes left of `path` when they wrote it; nobody may be writing it."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if "." not in part.name.removeprefix(f".{path.name}.").removesuffix(".tmp"):  # else another file's
            part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, so that its hash can be a name."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(text: str | bytes) -> str:
    """SHA-256 of `text`, in hexadecimal."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()


def write(path: Path, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write tensors of any shape, and what is said about them, to `path`, atomically, as a safetensors file.

    `about` is of JSON's types, with a "version". The header holds it, and a checksum of it and of the tensors.
    """
    form = torch.contiguous_format  # copies, since two may be the same tensor
    tensors = {name: torch.clone(t.detach().cpu(), memory_format=form) for name, t in tensors.items()}
    told = canonical_json(about)
    # one entry alone: the library writes several in any order, and equal contents should give equal files
    whole = save(tensors, {"emqlib": _digest(told, tensors) + told})
    write_atomic(path, lambda file: file.write(whole))


def read(path: Path, version: int, expected: str, name: str = "path") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` wrote: `about`, and the tensors of any shape on the CPU.

    ValueError: no such file, not whole, changed, or of another `version`. It calls the file `name`, and says what is
    `expected` of it.
    """
    with checks.expecting(name, str(path), expected), safe_open(path, "pt") as file:
        checksum, told = file.metadata()["emqlib"][:64], file.metadata()["emqlib"][64:]
        about = json.loads(told)
        names = file.keys()
        tensors = {key: file.get_tensor(key) for key in names}
    found = about.get("version") if isinstance(about, dict) else None
    if found != version:
        raise checks.invalid(name, str(path), f"{expected}, of version {version} of the format, not {found!r}")
    if checksum != _digest(told, tensors):
        raise checks.invalid(name, str(path), f"{expected}: it is not what was saved, its checksum differs")
    return about, tensors


def _digest(told: str, tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(told.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def flattened(tree: Any, tensors: dict[str, Tensor], at: str = "") -> Any:
    """`tree` (dicts, lists, tuples, tensors, numbers, texts, None) in JSON's types; its tensors go into `tensors`."""
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
    if kind == "dict":
        return {key: restored(item, tensors) for key, item in value}
    return {"list": list, "tuple": tuple}[kind](restored(item, tensors) for item in value)


def load_state(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load the tensors (any shape) of a file. It holds no versions of modules, so they count as those of today."""
    state = OrderedDict(tensors)
    state._metadata = model.state_dict()._metadata
    model.load_state_dict(state)


def software() -> dict[str, Any]:
    """This software's commit, and whether it was changed since; versions of Python and PyTorch."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "emqlib")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def _git(*arguments: str) -> str:
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no commit
        if (CHECKOUT / ".git").exists():  # not where this was installed, maybe inside somebody else's checkout
            command = ["git", "-C", str(CHECKOUT), *arguments]
            return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    return ""
