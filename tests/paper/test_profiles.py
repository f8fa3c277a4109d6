"""A notebook's parameters, by wrong and right values, and the profile they name."""

from pathlib import Path

import pytest
import torch

from emqlib import files
from emqlib.paper.profiles import PROFILES, parameters


@pytest.fixture(autouse=True)
def no_profile_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMQ_PROFILE", raising=False)


WRONG = {
    "profile": ["", "Smoke", "huge", None, 3, True, ["small"]],
    "bits": [
        *("[2,banana]", "", "2;4", "[]", "[2,2]", "[2,[4]]", "[2,4", "9", "None", "True", "[2, '4']", "banana"),
        *("{'a': 1}", "{[1]: 2}", "__import__('os')", "[2] + [4]", "-" * 5000 + "1", "\0", "[0]", "2.0"),
        *([], [2, 2], [2, [4]], 9, 0, -1, True, 2.0, None, {"a": 1}, {2, 4}, ["2"], float("nan")),
    ],
    "seed": [-1, 1.5, "0", "banana", None, True, [0]],
    "repeats": [-1, 1.5, "1", "banana", None, True, [1]],
    "pruning_rates": [
        *("[0.5,banana]", "", "0.5;0.8", "[0.5,0.5]", "[[0.5]]", "['0.5']", "nan", "None", "1", "__import__('os')"),
        *(1, 1.0, -0.1, [0.5, 1.5], [0.5, 0.5], True, None, {"a": 1}, float("nan"), float("inf")),
    ],
    "lengths": [*("[4,banana]", "", "4;8", "[4,4]", "None"), *(0, -1, 1.5, True, None, [4, 4], [0], {"a": 1})],
    "results_dir": ["", None, 3, True, ["results"]],
    "dataset": ["mnist", "ImageNet", "imagefolder", None, 3, ["cifar10"]],
    "model": ["resnet", "torchvision", "torchvision.nothing", "torchvision.", "keras.resnet50", None, 3],
}


def unquoted(value: object) -> str:
    return repr(value).translate(str.maketrans("", "", "\"'\\ "))


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_parameter(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=") as error:
        parameters(**{"profile": "smoke", name: value})
    given, _, allowed = str(error.value).removeprefix(f"{name}=").rpartition(": expected ")
    assert unquoted(value)[:500] in unquoted(given) and len(allowed) > 5


@pytest.mark.parametrize(
    ("given", "bits"),
    [
        ("[2,4,8]", (2, 4, 8)),
        ("(2, 4)", (2, 4)),
        ("2,4", (2, 4)),
        (" [8, 2] ", (2, 8)),
        ("4", (4,)),
        (4, (4,)),
        ([4], (4,)),
        ((32, 1), (1, 32)),
    ],
)
def test_bits(given: object, bits: tuple[int, ...]) -> None:
    assert parameters(profile="smoke", bits=given).bits == bits


@pytest.mark.parametrize(
    ("given", "rates"),
    [("[0.5, 0.8]", (0.5, 0.8)), ([0.9, 0], (0.9, 0.0)), ("0.8", (0.8,)), (0.25, (0.25,)), ("[]", ()), ((), ())],
)
def test_pruning_rates(given: object, rates: tuple[float, ...]) -> None:
    assert parameters(profile="smoke", pruning_rates=given).pruning_rates == rates


@pytest.mark.parametrize(
    ("given", "lengths"), [("[12, 4]", (4, 12)), ((4, 12), (4, 12)), ("8", (8,)), (8, (8,)), ("[]", ()), ((), ())]
)
def test_lengths(given: object, lengths: tuple[int, ...]) -> None:
    assert parameters(profile="smoke", lengths=given).lengths == (lengths or PROFILES["smoke"].lengths)


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


def test_results_dir_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    for place in (file, file / "below", str(file)):
        with pytest.raises(ValueError, match=rf"^results_dir='{place}': expected a folder"):
            parameters(profile="smoke", results_dir=place)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match=r"^results_dir=.*that can be written to"):
        parameters(profile="smoke", results_dir=tmp_path)


def test_data_and_network() -> None:
    p = parameters(profile="smoke")
    assert (p.dataset, p.model) == ("", "")
    p = parameters(profile="smoke", dataset="imagefolder:/some/where", model="torchvision.resnet18")
    assert (p.dataset, p.model) == ("imagefolder:/some/where", "torchvision.resnet18")
    assert parameters(profile="smoke", dataset="imagefolder:here").dataset == f"imagefolder:{Path.cwd() / 'here'}"
