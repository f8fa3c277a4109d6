"""Files that are either whole or absent, and hashes that name them."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

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


class Telling:
    """A binary file for a library that hides why writing it failed: `error` holds what the file itself said."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write `data`; OSError as the file raises it."""
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Pass on what is buffered."""
        self.file.flush()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_atomic(path, lambda file: file.write(text.encode()))


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, so that its hash can be a name."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(text: str | bytes) -> str:
    """SHA-256 of `text`, in hexadecimal."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()
