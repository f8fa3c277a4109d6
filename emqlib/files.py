"""Files that are either whole or absent, and hashes that name them."""

import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

CHECKOUT = Path(__file__).resolve().parent.parent


def home() -> Path:
    """The folder that `data/`, `results/` and `build/` lie in by default, whatever folder a notebook is run from.

    The checkout this package lies in, or the working directory where it was installed without one.
    """
    return CHECKOUT if (CHECKOUT / "pyproject.toml").exists() else Path.cwd()


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it to `path`.

    Whoever reads `path`, at any moment and after any crash, finds the old file or the new one, never a part.
    OSError, which names `path`: the folder cannot be written to, or the disk is full; nothing is left behind then.
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
    """Within the block no other process is in such a block for `path`; a killed one is out of it, whatever it left.

    Parts of the file that a killed process left behind are removed. The same thread may enter again within the block.
    patience: seconds to wait for another process, -1 for as long as it takes. Busy: it has not finished by then.
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
