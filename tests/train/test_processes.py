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


def launch_alone(folder: Path, case: str) -> list[tuple[int, str]]:
    """Exit status and standard error of two processes that no launcher watches.

    torchrun ends the other processes as soon as it sees that one has died, often before they can say so themselves.
    """
    together = plain_environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    command = [sys.executable, process_worker.__file__, str(folder), case]
    processes = [
        subprocess.Popen(
            command, env=together | {"RANK": str(i), "LOCAL_RANK": str(i)}, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def found(folder: Path, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (json.loads((folder / f"{case}-{index}.json").read_text()) for index in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found in every case, trained one after the other."""
    folder = tmp_path_factory.mktemp("processes")
    done = launch(folder, *process_worker.CASES, "sliced", "own loop", "often", "not whole", "damaged", "norm")
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
    alone, (first, second), often = process_worker.own_loop(), found(together, "own loop"), found(together, "often")
    assert often[0]["rows"] == alone["rows"] and often[0]["exchanges"] == often[1]["exchanges"] == [6, 0, 0]
    assert first["rows"] == second["rows"] == alone["rows"] and len(alone["rows"]) == 4
    for whole, (bits, *left), (other, *right) in zip(alone["seen"], first["seen"], second["seen"], strict=True):
        assert whole == [bits, *left, *right] and bits == other and len(left) - len(right) in (0, 1)
    assert first["exchanges"] == second["exchanges"] == [1, 0, 0]  # once an epoch that is scored
    damaged = process_worker.own_loop(damaged=True)["rows"]
    assert found(together, "damaged")[0]["rows"] == found(together, "damaged")[1]["rows"] == damaged != alone["rows"]
    assert found(together, "not whole")[0]["rows"] == process_worker.own_loop(whole=False)["rows"] != alone["rows"]


def test_batch_norm_in_parts_exchanges_numbers_once_each_way(together: Path) -> None:
    for place in found(together, "norm"):
        assert place["calls"] == [1, 2] * 3
        assert max(place["errors"]["torch.float64"]) < 1e-12 and max(place["errors"]["torch.float32"]) < 1e-4
        assert max(place["errors"]["torch.bfloat16"]) < 0.008  # a step of bfloat16


def test_processes_stop_together_when_time_is_up_and_end_as_if_they_had_not(together: Path) -> None:
    """To the bit, with the dropout of each; after all of the four epochs but the last."""
    for found_by in found(together, "sliced"):
        assert found_by["same"] and found_by["stops"] == 3


def test_a_killed_process_ends_the_job_and_all_go_on_together(tmp_path: Path) -> None:
    (status, error), (killed, _) = launch_alone(tmp_path, "killed")
    assert status == 1 and killed == -signal.SIGKILL and not list(tmp_path.glob("*.json"))
    message = "process 0 of 2: another process has stopped, see its own error; start all of them again, and training"
    assert f"{message} goes on from the checkpoint {tmp_path / 'run.pt'}" in error
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
    net = torch.nn.Linear(2, 2)
    assert place.wrap(net) is net and place.share({"a": 1}) == {"a": 1}
    with pytest.raises(RuntimeError, match=r"^gloo: its own$"), place.joined("here"):
        raise RuntimeError("gloo: its own")


def test_parts_cover_a_batch_once_and_differ_by_one_at_most() -> None:
    for count in (1, 2, 3, 8):
        for size in (8, 9, 31):
            parts = [Place(index, count).part(torch.arange(size)) for index in range(count)]
            assert torch.cat(parts).tolist() == list(range(size))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_error_of_its_own_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^out of memory$"), Place(0, 2).joined("here"):
        raise RuntimeError("out of memory")
    message = r"^process 1 of 2: another process has stopped.*goes on from here$"
    with pytest.raises(RuntimeError, match=message), Place(1, 2).joined("here"):
        raise torch.distributed.DistBackendError("NCCL timed out")


def test_without_accelerate_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r'pip install "emqlib\[distributed\]"'):
        distributed.current()


def test_layers_measure_over_processes_within_training_alone() -> None:
    model = process_worker.network(activation_range="tracked")
    layers = [m for m in model.modules() if hasattr(m, "gathered")]
    assert len(layers) == 4  # two batch norms, a quantized layer and its input
    with pytest.raises(ZeroDivisionError), distributed.synchronized(model, Place(0, 2)):
        assert all(m.gathered for m in layers)
        raise ZeroDivisionError
    assert not any(m.gathered for m in layers)
    with distributed.synchronized(model, Place()):
        assert not any(m.gathered for m in layers)
