"""Two processes that train together, on a CPU, against one: real processes, started as a user would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rank_worker
import torch

from emqlib import checkpoints, container, ranks
from emqlib.ranks import Ranks


def launch(folder: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EMQ_")} | {"OMP_NUM_THREADS": "1"}
    command += [rank_worker.__file__, str(folder), *cases]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def found(folder: Path, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (json.loads((folder / f"{case}-{rank}.json").read_text()) for rank in (0, 1))
    return first, second


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def killed(folder: Path) -> str:
    """What a job said in `folder`, one of whose two processes was killed."""
    done = launch(folder, "killed")
    assert done.returncode != 0 and not list(folder.glob("*.json"))
    about, _ = container.read(folder / "run.pt", checkpoints.VERSION, "a checkpoint")
    assert 1 <= len(json.loads(about["history"])) < 4
    return done.stderr


@pytest.fixture(scope="module")
def together(killed: str, folder: Path) -> Path:
    """What two processes found in every case, trained one after the other: the killed one resumed, and all others."""
    done = launch(folder, "resumed", *rank_worker.CASES, "sliced")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", rank_worker.CASES)
def test_two_processes_train_as_one(case: str, together: Path) -> None:
    alone, (first, second) = rank_worker.run(case), found(together, case)
    assert (first["rank"], second["rank"], first["count"]) == (0, 1, 2)
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


def test_ranks_stop_together_when_time_is_up_and_end_as_if_they_had_not(together: Path) -> None:
    """To the bit, with the dropout of each; two epochs of eight steps, two of four, all but the last of which stop."""
    for found_by in found(together, "sliced"):
        assert found_by["same"] and found_by["stops"] == 23


def test_a_killed_rank_ends_the_job_and_all_go_on_together(killed: str, together: Path) -> None:
    message = "rank 0 of 2: another rank has stopped, see its own error; start all of them again, and training goes on"
    assert f"{message} from the checkpoint {together / 'run.pt'}" in killed
    alone, (first, second) = rank_worker.run("bitwise"), found(together, "resumed")
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-6) and first["loss"] == second["loss"]
    assert first["coresets"] == alone["coresets"] == second["coresets"]
    for name, values in alone["state"].items():
        assert first["state"][name] == pytest.approx(values, rel=1e-9, abs=1e-12), name


def test_alone_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    place = ranks.current()
    assert place == Ranks(0, 1) and place.main
    x = torch.arange(5.0)
    assert place.part(x) is not None and torch.equal(place.part(x), x)
    indices, p, nothing = place.gather(torch.tensor([3, 1]), x[:2], None)
    assert indices.tolist() == [3, 1] and torch.equal(p, x[:2]) and nothing is None
    net = torch.nn.Linear(2, 2)
    assert place.wrap(net) is net and place.sums(1.5, 2.0) == [1.5, 2.0] and place.share({"a": 1}) == {"a": 1}
    with pytest.raises(RuntimeError, match=r"^gloo: its own$"), place.joined("here"), place.alone(net):
        raise RuntimeError("gloo: its own")


def test_parts_cover_a_batch_once_and_differ_by_one_at_most() -> None:
    for count in (1, 2, 3, 8):
        for size in (8, 9, 31):
            parts = [Ranks(rank, count).part(torch.arange(size)) for rank in range(count)]
            assert torch.cat(parts).tolist() == list(range(size))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_error_of_its_own_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"^out of memory$"), Ranks(0, 2).joined("here"):
        raise RuntimeError("out of memory")
    message = r"^rank 1 of 2: another rank has stopped.*goes on from here$"
    with pytest.raises(RuntimeError, match=message), Ranks(1, 2).joined("here"):
        raise torch.distributed.DistBackendError("NCCL timed out")


def test_without_accelerate_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r'pip install "emqlib\[distributed\]"'):
        ranks.current()


def test_layers_measure_over_ranks_within_training_alone() -> None:
    model = rank_worker.network(activation_range="tracked")
    layers = [m for m in model.modules() if hasattr(m, "across_ranks")]
    assert len(layers) == 4  # two batch norms, a quantized layer and its input
    with pytest.raises(ZeroDivisionError), ranks.synchronized(model, Ranks(0, 2)):
        assert all(m.across_ranks for m in layers)
        raise ZeroDivisionError
    assert not any(m.across_ranks for m in layers)
    with ranks.synchronized(model, Ranks()):
        assert not any(m.across_ranks for m in layers)
