"""Where a number came from: the software, the machine and the data."""

import platform
import subprocess
from contextlib import suppress
from typing import Any

import torch
import torchvision

from . import files
from .data import Dataset


def software() -> dict[str, Any]:
    """This software's commit, and whether it was changed since; versions of Python and PyTorch."""
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "emqlib")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


def provenance(data: Dataset, device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Where a number came from: `software`, device, checksum of the data."""
    several = f"{processes} x " if processes > 1 else ""
    cpu = f"cpu, {torch.get_num_threads()} threads"
    name = several + (cpu if device.type == "cpu" else torch.cuda.get_device_name(device))
    return software() | {"device": name, "data_sha256": data.sha256}


def _git(*arguments: str) -> str:
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no commit
        if (files.CHECKOUT / ".git").exists():  # not where this was installed, maybe inside somebody else's checkout
            command = ["git", "-C", str(files.CHECKOUT), *arguments]
            return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    return ""
