"""Data sets written as class folders, which is how experiments stream small ones."""

from pathlib import Path

import pytest
import torch

from emqlib.paper.experiments import write_class_folders
from emqlib.train.sources import load_dataset


def test_class_folders_written_and_read_again_are_the_same_data(tmp_path: Path) -> None:
    data = load_dataset("digits").subset(30, 20)
    folder = tmp_path / "a" / "digits"
    write_class_folders(data, folder)
    again = load_dataset(f"imagefolder:{folder}")
    assert again.sha256 != data.sha256 and again.classes == data.classes  # class by class now
    for ours, theirs in ((again.train, data.train), (again.test, data.test)):
        order = theirs.labels.argsort(stable=True)
        assert torch.equal(ours.labels, theirs.labels[order]) and torch.equal(ours.images, theirs.images[order])
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    write_class_folders(data, folder)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")} and len(times) == 50
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]


def test_the_first_of_two_that_write_class_folders_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, folder = load_dataset("digits").subset(10, 10), tmp_path / "digits"
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        (folder / "theirs").mkdir(parents=True)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    write_class_folders(data, folder)
    assert [path.name for path in folder.iterdir()] == ["theirs"] and list(tmp_path.iterdir()) == [folder]
