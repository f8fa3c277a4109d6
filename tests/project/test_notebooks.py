"""The notebooks as a reader runs them: papermill, in the smoke profile, in a checkout of their own.

Each kernel takes seconds to start, so each of the runs here answers several questions. What no kernel is needed for is
asked of the cells in this process.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import nbformat
import pandas as pd
import pytest
from papermill.cli import _resolve_type
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from safetensors.torch import save_file
from torchvision.models import resnet18

from emqlib import load_dataset
from emqlib.paper import experiments
from emqlib.paper.experiments import write_class_folders

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "GUIDE.md").read_text()
TRIED = dict(re.findall(r"^\| `(\d\d_\w+)\.ipynb` \| .* \| `(-p .*)` \|$", GUIDE, flags=re.MULTILINE))


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def papermill(checkout: Path, cwd: Path, notebook: str, output: Path, *arguments: str, profile: str = "smoke") -> str:
    """Run a notebook in a fresh kernel, with no settings of the user's; returns what papermill said where it failed."""
    own = {"PYTHONPATH": str(checkout), "EMQ_PROFILE": profile, "OMP_NUM_THREADS": "1"}
    own |= {name: str(checkout.parent / "user") for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", notebook, str(output)]
    command += arguments
    result = subprocess.run(command, cwd=cwd, env=os.environ | own, capture_output=True, text=True)
    return result.stderr if result.returncode else ""


def cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def quickstart(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The quickstart as the guide has one try it: the executed notebook, and where its results lie."""
    shutil.rmtree(checkout / "build", ignore_errors=True)
    output = tmp_path_factory.mktemp("quickstart") / "out.ipynb"
    assert not papermill(
        checkout, checkout, "notebooks/00_quickstart.ipynb", output, *shlex.split(TRIED["00_quickstart"])
    )
    return output, checkout / "build/smoke"


def test_quickstart_from_the_root(quickstart: tuple[Path, Path], checkout: Path) -> None:
    output, place = quickstart
    assert {path.name for path in place.iterdir()} == {"checkpoints", "runs", "smoke"}
    assert {path.name for path in (place / "smoke").iterdir()} == {
        f"00_quickstart.{kind}" for kind in ("csv", "md", "png", "svg")
    }

    rows = pd.read_csv(place / "smoke/00_quickstart.csv", dtype={"run": str})
    assert len(rows) == 2 * 2 * 8  # corrections, adaptations, bit-widths
    assert set(rows.bits[rows.trained]) == {1, 2, 4, 8} and set(rows.seed) == {1}
    assert {f"{name}.json" for name in rows.run} == {path.name for path in (place / "runs").iterdir()}
    assert set(rows.commit) == {git(checkout, "rev-parse", "HEAD")} and not rows.dirty.any()
    assert set(rows.profile) == {"smoke"} and set(rows.dataset) == {"digits"}

    header = (place / "smoke/00_quickstart.md").read_text().splitlines()[0]
    assert re.findall(r"\d\*?", header) == ["1*", "2*", "3", "4*", "5", "6", "7", "8*"]
    shown = [output for cell in cells(output) for output in cell.outputs]
    assert any("2*" in output.get("data", {}).get("text/html", "") for output in shown)
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert {output.name for output in shown if output.output_type == "stream"} == {"stdout"}  # stderr is shown on red
    assert not git(checkout, "status", "--porcelain")


BARS = r"""
[how long it took]
regex: \[\d\d:\d\d<[^\]]*\]
replace: [time]
"""


def test_the_same_outputs_again(quickstart: tuple[Path, Path], checkout: Path, tmp_path: Path) -> None:
    """What papermill wrote, executed once more from nothing: nbval compares every output, down to the last digit."""
    output, place = quickstart
    written = {path.relative_to(place): path.read_bytes() for path in place.rglob("*.[cm][sd]*")}
    shutil.rmtree(place)
    (tmp_path / "bars.cfg").write_text(BARS)
    nbval = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-o", "addopts=", "-W", "default"]
    nbval += [f"--nbval-sanitize-with={tmp_path / 'bars.cfg'}", f"--rootdir={output.parent}", str(output)]
    environment = os.environ | {"PYTHONPATH": str(checkout), "EMQ_PROFILE": "smoke", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(nbval, cwd=output.parent, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    count = len([cell for cell in cells(output) if cell.source.strip()])
    assert f"{count} passed" in result.stdout
    tables = [name for name in written if name.suffix == ".md"]
    assert tables and all((place / name).read_bytes() == written[name] for name in tables)


@pytest.mark.thorough
def test_table_1_from_its_folder(checkout: Path, tmp_path: Path) -> None:
    """As the guide has it; the rows lie outside of what git sees."""
    shutil.rmtree(checkout / "build", ignore_errors=True)
    (arguments,) = re.findall(r"^papermill 01_cifar10.ipynb out.ipynb (.*)$", GUIDE, flags=re.MULTILINE)
    output, arguments = tmp_path / "out.ipynb", shlex.split(arguments)
    assert not papermill(checkout, checkout / "notebooks", "01_cifar10.ipynb", output, *arguments, profile="small")
    assert not git(checkout, "status", "--porcelain")
    place = checkout / "build/smoke/smoke"
    tables = ("", "_cost", "_gap", "_curves", "_curves_cost")
    names = [f"{end}.md" for end in tables] + [".csv", "_curves.csv"]
    names += [f"{end}.{kind}" for end in ("", "_curves", "_curves_time") for kind in ("png", "svg")]
    expected = {f"01_cifar10{name}" for name in names}
    assert {path.name for path in place.iterdir()} == expected

    rows = pd.read_csv(place / "01_cifar10.csv", dtype={"run": str})
    assert set(rows.method) == {"Dedicated", "Any-Precision", "Ours"} and set(rows.bits[rows.trained]) == {2, 4, 8}
    assert "summary: top1 (%)" in (place / "01_cifar10_cost.md").read_text()


def read(notebook: str, *arguments: str) -> dict[str, object]:
    """The names after the cell that reads the parameters has read them, given as papermill's command line has them."""
    given = dict(zip(arguments[1::3], map(_resolve_type, arguments[2::3]), strict=True))
    source = parameterize_notebook(load_notebook_node(str(ROOT / f"notebooks/{notebook}.ipynb")), given)
    names: dict[str, object] = {}
    for cell in source.cells:
        if "injected-parameters" in cell.metadata.tags:
            assert given.keys() <= {name for name in names if not name.startswith("_")}
        if cell.cell_type == "code":
            first = ast.parse(cell.source).body  # of the cell that also starts the runs, the call that reads alone
            first = first[:1] if "profiles.parameters(" in cell.source else first
            with matplotlib.rc_context():  # the style that a notebook sets is its own
                exec(compile(ast.Module(first, []), notebook, "exec"), names)
        if "p" in names:
            return names
    raise AssertionError(f"{notebook} reads no parameters")


@pytest.mark.parametrize("notebook", TRIED)
def test_what_the_guide_has_one_try_is_read(notebook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the quickstart are executed above, all of them by `make faults`."""
    monkeypatch.setenv("EMQ_PROFILE", "smoke")
    assert read(notebook, *shlex.split(TRIED[notebook]))["p"].profile.name == "smoke"


@pytest.mark.thorough
@pytest.mark.parametrize("notebook", TRIED)
def test_what_the_guide_has_one_try_is_run(notebook: str, checkout: Path, tmp_path: Path) -> None:
    arguments = shlex.split(TRIED[notebook])
    if {"PATH", "FILE"} <= {*arguments}:  # images and weights of the reader's own
        write_class_folders(load_dataset("digits", image_size=16).subset(80, 40), tmp_path / "PATH")
        (tmp_path / "PATH/val").rename(tmp_path / "PATH/test")
        save_file(resnet18().state_dict(), tmp_path / "FILE")
        arguments = [str(tmp_path / given) if given in ("PATH", "FILE") else given for given in arguments]
    assert not papermill(checkout, checkout / "notebooks", f"{notebook}.ipynb", tmp_path / "out.ipynb", *arguments)


def test_imagenet_by_the_users_own_call_says_at_once_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMQ_DATA", str(tmp_path / "nothing"))
    given = ("-p", "bits", "[2,4,8]", "-p", "profile", "small", "-p", "results_dir", str(tmp_path / "made"))
    p, trained = read("03_imagenet", *given)["p"], []
    monkeypatch.setattr("emqlib.paper.runs.train", lambda *_, **__: trained.append(1))
    with pytest.raises(FileNotFoundError, match=r"(?s)^no data for 'imagenet'. Looked in:.*image-net.org") as error:
        experiments.run_all(experiments.imagenet(p), p.results_dir)
    assert str(tmp_path / "nothing/imagenet") in str(error.value) and not trained
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
