"""Where a number came from: the software, the machine and the data."""

import platform
import re
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchvision

from . import devices, files
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


def provenance(data: Dataset, device: torch.device, processes: int = 1, autocast: str = "none") -> dict[str, Any]:
    """Where a number came from: `software`, device, processor, autocast type, checksum of the data.

    autocast: what was asked for; told is what `device` gives (see `devices.autocast_used`).
    """
    several = f"{processes} x " if processes > 1 else ""
    cpu = f"cpu, {torch.get_num_threads()} threads"
    name = several + (cpu if device.type == "cpu" else torch.cuda.get_device_name(device))
    machine = {"device": name, "processor": _processor(), "instructions": torch.backends.cpu.get_cpu_capability()}
    return software() | machine | {"autocast": devices.autocast_used(autocast, device), "data_sha256": data.sha256}


@cache
def _processor() -> str:
    """The processor's model, as the system names it."""
    with suppress(OSError):  # Linux alone has this file, and not on every architecture a model in it
        if found := re.search(r"^model name\s*: *(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or no commit
        if (files.CHECKOUT / ".git").exists():  # not where this was installed, maybe inside somebody else's checkout
            command = ["git", "-C", str(files.CHECKOUT), *arguments]
            return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    return ""
