"""Fixtures that several test files share."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from emqlib.train import checkpoint as checkpoints
from emqlib.train import loop as training

# A busy machine is no failure, and every run tries the same examples.
settings.register_profile(
    "steady", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, database=None
)
settings.load_profile("steady")


@pytest.fixture
def rng() -> torch.Generator:
    """A seeded generator: every test draws the same numbers, whatever ran before it."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _no_profile_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMQ_PROFILE", raising=False)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """The tests' tensors are so small that a second thread costs more than it brings."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def drawn_as_committed() -> None:
    """Skips what compares a figure with a committed one where what drew that was of another release."""
    constraints = (Path(__file__).resolve().parents[1] / "constraints.txt").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", constraints, re.MULTILINE))
    others = [name for name in ("matplotlib", "seaborn", "pillow") if version(name) != pinned[name]]
    if others:
        pytest.skip(f"{', '.join(others)} of another release than in constraints.txt: other bytes")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What commands and notebooks need of this checkout, committed: what they leave behind is seen, and harms nothing.

    `build/` is for all who ask: a test that looks at what is made there empties it first.
    """
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root, folder = Path(__file__).resolve().parents[1], tmp_path_factory.mktemp("shared") / "checkout"
    for name in ("emqlib", "notebooks", "results/paper", "results/benchmarks"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "constraints.txt", "Makefile", ".gitignore"):
        shutil.copy(root / name, folder)
    commit = ("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--no-gpg-sign", "--message", "a")
    for arguments in (["init"], ["add", "."], commit):
        subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True)
    return folder


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is: a second later after each step, and else as late as before."""
    now, step = [0.0], training._step

    def timed(*args: Any) -> None:
        step(*args)
        now[0] += 1

    monkeypatch.setattr(training, "_step", timed)
    monkeypatch.setattr(checkpoints, "monotonic", lambda: now[0])
    return now
