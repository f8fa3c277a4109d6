"""Files and arguments that try to run code or to lead elsewhere. What the sources may not contain: test_style."""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import CIFAR10

import emqlib as emq
from emqlib.layers import QuantSpec
from emqlib.paper import experiments, profiles
from emqlib.train.config import TrainConfig


class Hostile:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What hostile content would leave behind; it would work."""
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists()
    mark.unlink()
    return mark


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


# Data


def test_official_files_are_unpickled_only_if_they_are_the_official_ones(mark: Path, tmp_path: Path) -> None:
    """CIFAR is published as pickles; torchvision looks at their checksums first."""
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], "")):
        (folder / name).write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(FileNotFoundError, match="damaged"):
        emq.load_dataset("cifar10", root=tmp_path / "data")
    assert not mark.exists()


def test_an_archive_that_is_not_the_official_one_is_not_unpacked(mark: Path, tmp_path: Path) -> None:
    root = tmp_path / "a" / "data"
    root.mkdir(parents=True)
    content = pickle.dumps(Hostile(mark))
    with tarfile.open(root / CIFAR10.filename, "w:gz") as archive:
        for name in ("../../outside", f"{tmp_path}/absolute", f"{CIFAR10.base_folder}/data_batch_1"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(FileNotFoundError, match="download failed"):
        emq.load_dataset("cifar10", root=root)
    assert not mark.exists() and not (tmp_path / "outside").exists() and not (tmp_path / "absolute").exists()
    assert not (root / CIFAR10.base_folder).exists()


# Networks and checkpoints


@pytest.mark.parametrize("write", [pickle.dump, torch.save])
def test_no_checkpoint_and_no_network_is_unpickled(write: Callable, mark: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "file", emq.load_dataset("digits").subset(20, 10)
    with path.open("wb") as file:
        write({"model": Hostile(mark)}, file)
    net = emq.models.resnet8(width=4)
    with pytest.raises(ValueError, match=r"^path=.*: expected a whole file that emqlib.save wrote"):
        emq.load(path, net)
    model = emq.convert(net, QuantSpec(bits=(2, 4)))
    with pytest.raises(ValueError, match=r"^checkpoint=.*: expected a whole checkpoint of this library"):
        emq.train(model, data, TrainConfig(epochs=1, batch_size=10), checkpoint=path, progress=False)
    assert not mark.exists()


# Parameters of a notebook, and of the command


@pytest.mark.parametrize("name", ["bits", "pruning_rates", "lengths", "seed", "repeats", "profile", "dataset", "model"])
def test_a_parameter_is_a_value_and_no_program(name: str, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    for text in (touch, f"[{touch}]", f"[2, {touch} or 4]", f"(lambda: {touch})()", "[b for b in (2, 4)]", "f'{2}'"):
        with pytest.raises(ValueError, match=rf"^{name}="):
            profiles.parameters(**{"profile": "smoke"} | {name: text})
        with pytest.raises(ValueError, match=rf"^{name}="):
            experiments.main(["quickstart", "--profile", "smoke", "-p", name, text])
    assert not mark.exists() and not capsys.readouterr().out
