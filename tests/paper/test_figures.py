"""Every committed figure is what its CSV gives, byte for byte."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import pandas as pd
import pytest
from matplotlib import pyplot

from emqlib.paper import plots as figures

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted(p for p in (ROOT / "results").rglob("*.png") if p.parent.name != "benchmarks")  # see test_benchmarks
matplotlib.use("agg")


def test_every_committed_figure_has_its_rows() -> None:
    assert COMMITTED and all(figures.source(path).exists() for path in COMMITTED)
    assert all(path.with_suffix(".svg").exists() for path in COMMITTED)


@pytest.mark.usefixtures("drawn_as_committed")
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_figure_is_redrawn_byte_for_byte(path: Path, tmp_path: Path) -> None:
    shutil.copy(figures.source(path), tmp_path)
    pyplot.close(figures.draw(tmp_path / path.stem).figure)
    for kind in (".png", ".svg"):
        assert (tmp_path / path.name).with_suffix(kind).read_bytes() == path.with_suffix(kind).read_bytes()
    assert path.with_suffix(".svg").stat().st_size < 120_000


DRAWN = sorted((ROOT / "results").rglob("*.svg"))


@pytest.mark.parametrize("path", DRAWN, ids=lambda path: path.stem)
def test_figures_speak_in_words(path: Path) -> None:
    """No name of a setting as the code has it, such as how=sample; each text of an SVG is a comment in it too."""
    texts = re.findall("<!-- (.*?) -->", path.read_text(), flags=re.DOTALL)
    assert len(texts) > 5
    assert not [text for text in texts if re.search(r"\w=\w|mean_var|resnet\d|cifar\d|vit_|(el2n|tdds)\b", text)]


def test_the_figure_follows_its_rows(tmp_path: Path) -> None:
    rows = pd.read_csv(ROOT / "results/small/00_quickstart.csv")
    rows.assign(top1=rows.top1 - 5).to_csv(tmp_path / "00_quickstart.csv", index=False)
    pyplot.close(figures.draw(tmp_path / "00_quickstart").figure)
    committed = ROOT / "results/small/00_quickstart.png"
    assert (tmp_path / "00_quickstart.png").read_bytes() != committed.read_bytes()


@pytest.mark.usefixtures("drawn_as_committed")
def test_all_figures_of_a_folder_are_redrawn_from_a_shell(tmp_path: Path) -> None:
    """That of the quickstart has no recipe of its own, and the two of notebook 11 share one CSV."""
    (tmp_path / "small").mkdir()
    for name in ("00_quickstart", "11_training_cost"):
        shutil.copy(ROOT / f"results/small/{name}.csv", tmp_path / "small")
    for name in ("00_quickstart", "11_training_cost", "11_training_time"):
        (tmp_path / f"small/{name}.png").touch()
    command = [sys.executable, "-m", "emqlib.paper.plots", str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert told == f"3 figures redrawn in {tmp_path}\n"
    for name in ("00_quickstart.png", "11_training_cost.png", "11_training_time.png"):
        assert (tmp_path / "small" / name).read_bytes() == (ROOT / "results/small" / name).read_bytes()
