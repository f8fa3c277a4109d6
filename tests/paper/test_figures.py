"""Every committed figure is what its CSV gives, byte for byte."""

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
COMMITTED = sorted(
    p for p in (ROOT / "results").glob("*/*.png") if p.parent.name != "benchmarks"
)  # see test_benchmarks
matplotlib.use("agg")


@pytest.mark.usefixtures("drawn_as_committed")
@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_a_committed_figure_is_redrawn_byte_for_byte(path: Path, tmp_path: Path) -> None:
    rows = path.with_name(f"{figures.FIGURES[path.stem][0]}.csv")
    shutil.copy(rows, tmp_path)
    pyplot.close(figures.draw(tmp_path / path.stem).figure)
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_the_figure_follows_its_rows(tmp_path: Path) -> None:
    rows = pd.read_csv(ROOT / "results/small/00_quickstart.csv")
    rows.assign(top1=rows.top1 - 5).to_csv(tmp_path / "00_quickstart.csv", index=False)
    pyplot.close(figures.draw(tmp_path / "00_quickstart").figure)
    committed = ROOT / "results/small/00_quickstart.png"
    assert (tmp_path / "00_quickstart.png").read_bytes() != committed.read_bytes()


@pytest.mark.usefixtures("drawn_as_committed")
def test_all_figures_of_a_folder_are_redrawn_from_a_shell(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    for name in ("00_quickstart.csv", "11_training_cost.csv"):
        shutil.copy(ROOT / "results/small" / name, tmp_path / "small")
    command = [sys.executable, "-m", "emqlib.paper.plots", str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert told == f"3 figures redrawn in {tmp_path}\n"
    for name in ("00_quickstart.png", "11_training_cost.png", "11_training_time.png"):
        assert (tmp_path / "small" / name).read_bytes() == (ROOT / "results/small" / name).read_bytes()
