"""What is published: one version wherever it is named, and files that work where they are installed.

Built by the backend that pyproject.toml names, without a network, from a copy of what git holds. They are used in a
process that knows the installed copy and the other packages, but no checkout.
"""

import email
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import emqlib as emq

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
README = (ROOT / "README.md").read_text()
NAME = f"emqlib-{emq.__version__}"

# No package but the backend's is there where files are built, torch as little as any other.
BUILD = """
import importlib, sys
sys.modules["torch"] = None
backend, hook, folder = sys.argv[1:]
getattr(importlib.import_module(backend), hook)(folder)
"""

USE = """
import json, sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import walk_packages
import torch
from torch import nn
import emqlib as emq

torch.set_num_threads(1)
torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
    nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
    nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10),
)
model = emq.convert(net, emq.QuantSpec(bits=(2, 8)))
data = emq.load_dataset("digits")
emq.train(model, data, emq.TrainConfig(epochs=1, batch_size=32, lr=0.02))
tables = [emq.evaluate(model, data, bits=(2, 5, 8))]
emq.save(model, "digits.safetensors")
loaded = emq.load("digits.safetensors", net)
tables.append(emq.evaluate(loaded, data, bits=(2, 5, 8)))
states = loaded.state_dict(), model.state_dict()
modules = [import_module(module.name).__file__ for module in walk_packages(emq.__path__, "emqlib.")]
print(json.dumps({
    "versions": [emq.__version__, version("emqlib")], "path": sys.path, "modules": [emq.__file__, *modules],
    "top1": [table.top1.tolist() for table in tables], "left": [path.name for path in Path().iterdir()],
    "same": states[0].keys() == states[1].keys() and all(map(torch.equal, *(state.values() for state in states))),
}))
"""


def run(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def held() -> list[str]:
    """What git holds here, or would with the next commit."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs a checkout, which says what belongs to it")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, cwd=ROOT, text=True).split("\0")
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def published(held: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheel and the sdist, of a checkout that is in use; the wheel comes first and leaves folders of its own."""
    checkout, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("published")
    for name in held:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    for name in ("data/digits.py", "build/demo/run.py", "emqlib/__pycache__/data.pyc", "results/checkpoints/a.npy"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    for hook in ("build_wheel", "build_sdist"):
        run("-c", BUILD, PYPROJECT["build-system"]["build-backend"], hook, out, cwd=checkout)
    files = {"wheel": out / f"{NAME}-py3-none-any.whl", "sdist": out / f"{NAME}.tar.gz"}
    assert set(out.iterdir()) == set(files.values())
    return files


@pytest.fixture(scope="module")
def installed(published: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what pip made of the sdist, by way of a wheel."""
    pip = ["-m", "pip", "--isolated", "--disable-pip-version-check", "install", "--no-index", "--no-deps"]
    folder, file = tmp_path_factory.mktemp("installed"), published["sdist"]
    run(*pip, "--no-build-isolation", "--no-compile", "--target", folder, file, cwd=file.parent)
    return folder


def test_one_version_everywhere() -> None:
    """`emqlib.__version__`, from which the files published have it; who cites it finds the changelog's date."""
    released = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", CHANGELOG, re.MULTILINE)
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert released[:2] == [("Unreleased", ""), (emq.__version__, cited["date-released"])]
    assert cited["version"] == emq.__version__
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert set(re.findall(r"emqlib[-=]+(\d[\d.]*\d)", README)) <= {emq.__version__}


def test_what_is_published_is_the_package_and_what_it_takes_to_build(
    held: list[str], published: dict[str, Path]
) -> None:
    """The wheel holds the package alone, byte for byte; the sdist also what the build reads."""
    package = {name: (ROOT / name).read_bytes() for name in held if name.startswith("emqlib/")}
    about = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE", "top_level.txt"}
    with zipfile.ZipFile(published["wheel"]) as wheel:
        names = wheel.namelist()
        assert sorted(names) == sorted(package.keys() | {f"{NAME}.dist-info/{name}" for name in about})
        assert {name: wheel.read(name) for name in package} == package
    papers = ("CHANGELOG.md", "CITATION.cff", "GUIDE.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")
    ours = package | {name: (ROOT / name).read_bytes() for name in papers}
    with tarfile.open(published["sdist"]) as sdist:
        files = [file for file in sdist.getmembers() if file.isfile()]
        texts = {file.name.removeprefix(f"{NAME}/"): sdist.extractfile(file).read() for file in files}
    made = {"PKG-INFO", "setup.cfg"}
    assert {k: v for k, v in texts.items() if k not in made and not k.startswith("emqlib.egg-info/")} == ours


def test_metadata(published: dict[str, Path]) -> None:
    """The wheel's are those of pyproject.toml and the README; every extra that the README names is offered."""
    with zipfile.ZipFile(published["wheel"]) as wheel:
        metadata = email.message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))
    one = {"Name": "emqlib", "Version": emq.__version__, "Requires-Python": ">=3.11", "License-Expression": "MIT"}
    one |= {"License-File": "LICENSE", "Project-URL": "Paper, https://arxiv.org/abs/2510.20673"}
    assert {key: metadata.get_all(key) for key in one} == {key: [value] for key, value in one.items()}
    assert metadata["Summary"] == PROJECT["description"] and "emqlib" in metadata["Author"]
    described = metadata.get_payload(decode=True).decode().strip()
    assert metadata["Description-Content-Type"] == "text/markdown" and described == README.strip()
    extras = PROJECT["optional-dependencies"]
    assert len(metadata.get_all("Requires-Dist")) == len(PROJECT["dependencies"]) + sum(map(len, extras.values()))
    assert set(metadata.get_all("Provides-Extra")) == set(extras)
    named = {extra for group in re.findall(r"(?:emqlib|\.)\[([\w,]+)\]", README) for extra in group.split(",")}
    assert named and named <= set(extras)


def test_it_works_where_it_is_installed(installed: Path, tmp_path: Path) -> None:
    # -S: none of the .pth files by which a checkout is installed; -P: no folder that happens to be the current one.
    path = os.pathsep.join([str(installed), *site.getsitepackages()])
    told = json.loads(run("-B", "-P", "-S", "-c", USE, cwd=tmp_path, PYTHONPATH=path))
    assert told["versions"] == [emq.__version__] * 2
    assert set(told["modules"]) == {
        str(file) for file in (installed / "emqlib").rglob("*.py")
    }  # and all can be imported
    assert str(ROOT) not in told["path"]
    assert [len(top1) for top1 in told["top1"]] == [3, 3] and min(map(min, told["top1"])) > 50
    assert told["same"] and told["left"] == ["digits.safetensors"]
