"""The notebooks as a reader runs them: papermill, in the smoke profile, in a checkout of their own.

Each kernel takes seconds to start, so each of the runs here answers several questions.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

pytest.importorskip("papermill")
pytest.importorskip("sklearn")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed part of this one that the notebooks need: what they leave behind can be seen, and harms nothing."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("emqlib", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copytree(ROOT / "results/paper", folder / "results/paper")
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--no-gpg-sign", "--message", "a")
    return folder


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def papermill(checkout: Path, cwd: Path, notebook: str, output: Path, *arguments: str, profile: str = "smoke") -> str:
    """Run a notebook in a fresh kernel, with no settings of the user's; returns what papermill said where it failed."""
    own = {"PYTHONPATH": str(checkout), "EMQ_PROFILE": profile, "OMP_NUM_THREADS": "1"}
    own |= {name: str(checkout.parent / "user") for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    command = [
        sys.executable,
        "-m",
        "papermill",
        "-k",
        "python3",
        "--no-progress-bar",
        notebook,
        str(output),
        *arguments,
    ]
    result = subprocess.run(command, cwd=cwd, env=os.environ | own, capture_output=True, text=True)
    return result.stderr if result.returncode else ""


def cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def assert_failed_at_once(output: Path) -> None:
    """The cell that reads the parameters is the first that failed, in under a second; none ran after it."""
    last = [cell for cell in cells(output) if cell.metadata.papermill.status != "pending"][-1]
    assert "profiles.parameters(" in last.source and last.metadata.papermill.status == "failed"
    assert last.metadata.papermill.duration < 1


def test_quickstart_from_the_root(checkout: Path, tmp_path: Path) -> None:
    place = tmp_path / "made"
    arguments = ["-p", "bits", "[2,4]", "-p", "results_dir", str(place)]
    assert not papermill(checkout, checkout, "notebooks/00_quickstart.ipynb", tmp_path / "out.ipynb", *arguments)
    assert {path.name for path in place.iterdir()} == {"checkpoints", "runs", "smoke"}
    assert {path.name for path in (place / "smoke").iterdir()} == {
        f"00_quickstart.{kind}" for kind in ("csv", "md", "png")
    }

    rows = pd.read_csv(place / "smoke/00_quickstart.csv", dtype={"run": str})
    assert len(rows) == 2 * 2 * 8  # corrections, adaptations, bit-widths
    assert set(rows.bits[rows.trained]) == {2, 4}
    assert {f"{name}.json" for name in rows.run} == {path.name for path in (place / "runs").iterdir()}
    assert set(rows.commit) == {git(checkout, "rev-parse", "HEAD")} and not rows.dirty.any()
    assert set(rows.profile) == {"smoke"} and set(rows.dataset) == {"digits"}

    header = (place / "smoke/00_quickstart.md").read_text().splitlines()[0]
    assert re.findall(r"\d\*?", header) == ["1", "2*", "3", "4*", "5", "6", "7", "8"]
    shown = [output for cell in cells(tmp_path / "out.ipynb") for output in cell.outputs]
    assert any("2*" in output.get("data", {}).get("text/html", "") for output in shown)
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert {output.name for output in shown if output.output_type == "stream"} == {"stdout"}  # stderr is shown on red
    assert not git(checkout, "status", "--porcelain")


def test_the_same_outputs_again(checkout: Path, tmp_path: Path) -> None:
    """What papermill wrote, executed once more from nothing: nbval compares every output, down to the last digit."""
    place, output = tmp_path / "made", tmp_path / "out.ipynb"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TQDM_DISABLE", "1")  # bars say how long it took
        assert not papermill(
            checkout, checkout, "notebooks/00_quickstart.ipynb", output, "-p", "results_dir", str(place)
        )
        written = {path.relative_to(place): path.read_bytes() for path in place.rglob("*.[cm][sd]*")}
        shutil.rmtree(place)
        for name, value in {"PYTHONPATH": str(checkout), "EMQ_PROFILE": "smoke", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        nbval = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-o", "addopts=", "-W", "default"]
        result = subprocess.run([*nbval, str(output)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    count = len([cell for cell in cells(output) if cell.source.strip()])
    assert f"{count} passed" in result.stdout
    tables = [name for name in written if name.suffix == ".md"]
    assert tables and all((place / name).read_bytes() == written[name] for name in tables)


def test_table_1_from_its_folder(checkout: Path, tmp_path: Path) -> None:
    """As the README has it; the rows lie outside of what git sees."""
    arguments = ["-p", "bits", "[2,4,8]", "-p", "profile", "smoke"]
    output = tmp_path / "out.ipynb"
    assert not papermill(checkout, checkout / "notebooks", "01_cifar10.ipynb", output, *arguments, profile="small")
    assert not git(checkout, "status", "--porcelain")
    place = checkout / "build/smoke/smoke"
    tables = ("", "_cost", "_gap", "_curves", "_curves_cost", "_equal_time")
    names = [f"{end}.md" for end in tables] + [".csv", ".png", "_curves.csv", "_curves.png", "_curves_time.png"]
    expected = {f"01_cifar10{name}" for name in names}
    assert {path.name for path in place.iterdir()} == expected

    rows = pd.read_csv(place / "01_cifar10.csv", dtype={"run": str})
    assert set(rows.method) == {"Dedicated", "Any-Precision", "Ours"}
    assert set(rows.bits[rows.trained]) == {2, 4, 8}
    cost = rows.drop_duplicates("run").groupby(["method", "pruning_rate", "coreset"])[
        ["sample_passes", "scoring_passes"]
    ]
    passes, scored = cost.max().to_numpy().T
    images, epochs = 320, 4  # of the profile
    kept = {0.5: (160, 213), 0.8: (64, 85), 0.9: (32, 43)}  # in an epoch, and in each of three that score 4/3 as many
    full = [("Any-Precision", 0.0), ("Dedicated", 0.0), ("Ours", 0.0)]
    bits = {"Any-Precision": 3, "Dedicated": 1, "Ours": 3}
    expected = {(method, rate, "full data"): bits[method] * epochs * images for method, rate in full}
    expected |= {("Ours", rate, "RS2"): 3 * epochs * count for rate, (count, _) in kept.items()}
    expected |= {("Ours", rate, "tdds"): 3 * (count + 3 * score) for rate, (count, score) in kept.items()}
    assert dict(zip(cost.groups, passes, strict=True)) == expected
    assert [key for key, count in zip(cost.groups, scored, strict=True) if count] == [("Ours", r, "tdds") for r in kept]
    assert "paper: top1 (%)" in (place / "01_cifar10_cost.md").read_text()


def test_wrong_bits(checkout: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.ipynb"
    message = papermill(checkout, checkout / "notebooks", "01_cifar10.ipynb", output, "-p", "bits", "[2,banana]")
    assert "ValueError: bits='[2,banana]': expected a list" in message
    assert_failed_at_once(output)


def test_misspelt_parameter(checkout: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.ipynb"
    message = papermill(checkout, checkout, "notebooks/00_quickstart.ipynb", output, "-p", "bitz", "4")
    assert "ValueError: parameter='bitz': expected one of bits, profile, results_dir, seed" in message
    assert_failed_at_once(output)


def test_imagenet_by_the_users_own_call_says_at_once_where_to_put_it(checkout: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.ipynb"
    arguments = ("03_imagenet.ipynb", output, "-p", "bits", "[2,4,8]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EMQ_DATA", str(tmp_path / "nothing"))
        message = papermill(checkout, checkout / "notebooks", *arguments, profile="small")
    assert "FileNotFoundError: no data for 'imagenet'. Looked in:" in message
    assert str(tmp_path / "nothing/imagenet") in message and "image-net.org" in message
    assert_failed_at_once(output)
    assert not git(checkout, "status", "--porcelain")
