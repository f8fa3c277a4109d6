"""Two processes that train together, on a CPU, against one: real processes, started as a user would."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import process_worker
import pytest
import torch

from emqlib import files as container
from emqlib.train import checkpoint as checkpoints
from emqlib.train import distributed
from emqlib.train.distributed import Place


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def plain_environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("EMQ_")} | {"OMP_NUM_THREADS": "1"}


def launch(folder: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [process_worker.__file__, str(folder), *cases]
    return subprocess.run(command, env=plain_environment(), capture_output=True, text=True, timeout=300)


def launch_alone(folder: Path, case: str) -> list[int]:
    """Exit status of two processes that no launcher watches: torchrun ends the others as soon as one has died."""
    together = plain_environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, process_worker.__file__, str(folder), case]
    processes = [
        subprocess.Popen(command, env=together | {"RANK": i, "LOCAL_RANK": i}, stderr=subprocess.DEVNULL) for i in "01"
    ]
    return [process.wait(timeout=300) for process in processes]


def found(folder: Path, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (json.loads((folder / f"{case}-{index}.json").read_text()) for index in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found in every case, trained one after the other."""
    folder = tmp_path_factory.mktemp("processes")
    done = launch(folder, *process_worker.CASES, "sliced", "own loop")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", process_worker.CASES)
def test_two_processes_train_as_one(case: str, together: Path) -> None:
    alone, (first, second) = process_worker.run(case), found(together, case)
    assert (first["index"], second["index"], first["count"]) == (0, 1, 2)
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert first["coresets"] == alone["coresets"] == second["coresets"]
    assert bool(first["coresets"]) == (case in ("bitwise", "features"))
    assert first["loss"] == second["loss"] and first["state"] == second["state"]
    for name, values in alone["state"].items():
        if case != "tracked":  # output correction takes the means of the first images of a part
            close = (
                {"rel": 1e-6, "abs": 1e-6} if case == "learned" else {"rel": 1e-9, "abs": 1e-12}
            )  # LSQ starts in float32
            assert first["state"][name] == pytest.approx(values, **close), name


def test_a_loop_of_ones_own_shares_batches_and_draws_the_same_coresets(together: Path) -> None:
    alone, (first, second) = process_worker.own_loop(), found(together, "own loop")
    assert first["rows"] == second["rows"] == alone["rows"] and len(alone["rows"]) == 4
    for whole, (bits, *left), (other, *right) in zip(alone["seen"], first["seen"], second["seen"], strict=True):
        assert whole == [bits, *left, *right] and bits == other and len(left) - len(right) in (0, 1)


def test_processes_stop_together_when_time_is_up_and_end_as_if_they_had_not(together: Path) -> None:
    """To the bit, with the dropout of each; after all of the four epochs but the last."""
    for found_by in found(together, "sliced"):
        assert found_by["same"] and found_by["stops"] == 3


def test_a_killed_process_ends_the_job_and_all_go_on_together(tmp_path: Path) -> None:
    status, killed = launch_alone(tmp_path, "killed")
    assert status == 1 and killed == -signal.SIGKILL and not list(tmp_path.glob("*.json"))
    about, _ = container.read(tmp_path / "run.pt", checkpoints.VERSION, "a checkpoint")
    assert 1 <= len(json.loads(about["history"])) < 4
    resumed = launch(tmp_path, "resumed")
    assert resumed.returncode == 0, resumed.stderr
    alone, (first, second) = process_worker.run("bitwise"), found(tmp_path, "resumed")
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-6) and first["loss"] == second["loss"]
    assert first["coresets"] == alone["coresets"] == second["coresets"]
    for name, values in alone["state"].items():
        assert first["state"][name] == pytest.approx(values, rel=1e-9, abs=1e-12), name


def test_alone_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    place = distributed.current()
    assert place == Place(0, 1) and place.main
    x = torch.arange(5.0)
    assert place.part(x) is not None and torch.equal(place.part(x), x)
    indices, p, nothing = place.gather(torch.tensor([3, 1]), x[:2], None)
    assert indices.tolist() == [3, 1] and torch.equal(p, x[:2]) and nothing is None
    net = torch.nn.Linear(2, 2)
    assert place.wrap(net) is net and place.sums(1.5, 2.0) == [1.5, 2.0] and place.share({"a": 1}) == {"a": 1}


def test_parts_cover_a_batch_once_and_differ_by_one_at_most() -> None:
    for count in (1, 2, 3, 8):
        for size in (8, 9, 31):
            parts = [Place(index, count).part(torch.arange(size)) for index in range(count)]
            assert torch.cat(parts).tolist() == list(range(size))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_without_accelerate_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r'pip install "emqlib\[distributed\]"'):
        distributed.current()
