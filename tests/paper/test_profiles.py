"""A notebook's parameters as they are read, and the profile they name."""

from pathlib import Path

import pytest
import torch

from emqlib import files
from emqlib.paper.profiles import PROFILES, parameters


@pytest.mark.parametrize(
    ("name", "given", "read"),
    [
        *(("bits", given, (2, 4)) for given in ("[2,4]", "(2, 4)", "2,4", " [4, 2] ", [2, 4], (4, 2))),
        *(("bits", given, (4,)) for given in ("4", 4, [4])),
        ("pruning_rates", "[0.5, 0.8]", (0.5, 0.8)),
        ("pruning_rates", [0.9, 0], (0.9, 0.0)),
        *(("pruning_rates", given, (0.8,)) for given in ("0.8", 0.8)),
        *(("pruning_rates", given, ()) for given in ("[]", ())),
        *(("lengths", given, (4, 12)) for given in ("[12, 4]", (4, 12))),
        *(("lengths", given, (8,)) for given in ("8", 8)),
        *(("lengths", given, PROFILES["smoke"].lengths) for given in ("[]", ())),
    ],
)
def test_lists(name: str, given: object, read: tuple) -> None:
    """As Python or papermill's command line writes them; what else is refused is in tests/project/bad_input.py."""
    assert getattr(parameters(profile="smoke", **{name: given}), name) == read


def test_seeds() -> None:
    assert parameters(profile="smoke").seeds == (0,)
    assert parameters(profile="small").seeds == (0, 1, 2)
    assert parameters(profile="small", seed=3, repeats=2).seeds == (3, 4)


@pytest.mark.parametrize(
    ("given", "variable", "cuda", "profile"),
    [
        ("auto", None, False, "small"),
        ("auto", None, True, "paper"),
        ("auto", "", False, "small"),
        ("auto", "auto", True, "paper"),
        ("auto", "smoke", True, "smoke"),
        ("small", "smoke", True, "small"),
    ],
)
def test_profile(monkeypatch: pytest.MonkeyPatch, given: str, variable: str | None, cuda: bool, profile: str) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    if variable is not None:
        monkeypatch.setenv("EMQ_PROFILE", variable)
    assert parameters(profile=given).profile is PROFILES[profile]


def test_wrong_profile_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMQ_PROFILE", "huge")
    with pytest.raises(ValueError, match=r"^profile='huge': expected one of auto, paper, small, smoke$"):
        parameters()
    assert parameters(profile="smoke").profile.name == "smoke"


def test_results_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = Path(__file__).resolve().parents[2]
    assert parameters(profile="small").results_dir == root / "results"
    assert parameters(profile="smoke").results_dir == root / "build/smoke"
    assert parameters(profile="smoke", results_dir="a/b").results_dir == tmp_path / "a/b"
    assert parameters(profile="smoke", results_dir=tmp_path).results_dir == tmp_path
    assert parameters(profile="smoke", results_dir="~/a").results_dir == tmp_path / "home/a"
    assert parameters(profile="smoke", results_dir="a").output("00") == tmp_path / "a/smoke/00"
    assert not list(tmp_path.iterdir())  # nothing is made before there is something to write


def test_results_dir_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "CHECKOUT", tmp_path / "site-packages")
    assert parameters(profile="small").results_dir == tmp_path / "results"
    assert parameters(profile="smoke").results_dir == tmp_path / "build/smoke"


def test_data_and_network() -> None:
    p = parameters(profile="smoke")
    assert (p.dataset, p.model) == ("", "")
    p = parameters(profile="smoke", dataset="imagefolder:/some/where", model="torchvision.resnet18")
    assert (p.dataset, p.model) == ("imagefolder:/some/where", "torchvision.resnet18")
    assert parameters(profile="smoke", dataset="imagefolder:here").dataset == f"imagefolder:{Path.cwd() / 'here'}"
