"""Every figure of the notebooks: the tidy CSV it is drawn from, which lies beside it, and what draws it.

`python -m emqlib.figures [FOLDER]` redraws each figure whose CSV is below FOLDER, by default the project's `results`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from . import checks, plots
from .files import home

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[[pd.DataFrame], "Axes"]

# The figure's name: its CSV, and the function of the rows in it.
FIGURES: dict[str, tuple[str, Draw]] = {
    "00_quickstart": ("00_quickstart", plots.accuracy_by_bits),
    "01_cifar10": ("01_cifar10", lambda rows: plots.accuracy_by_bits(_ours_on_full_data(rows))),
    "01_cifar10_curves": ("01_cifar10_curves", plots.accuracy_by_cost),
    "01_cifar10_curves_time": ("01_cifar10_curves", lambda rows: plots.accuracy_by_cost(rows, "seconds")),
    "02_cifar100": ("02_cifar100", plots.accuracy_by_cost),
    "02_tinyimagenet": ("02_tinyimagenet", plots.accuracy_by_cost),
    "03_imagenet": ("03_imagenet", plots.accuracy_by_bits),
    "04_vit_cifar10": ("04_vit_cifar10", plots.accuracy_by_bits),
    "04_vit_tinyimagenet": ("04_vit_tinyimagenet", plots.accuracy_by_bits),
    "04_layer_norms": ("04_layer_norms", plots.mismatch),
    "05_coreset_comparison": ("05_coreset_comparison", plots.accuracy_by_pruning),
    "06_bias_correction": ("06_bias_correction", lambda rows: plots.accuracy_by_bits(_ends_of_correction(rows))),
    "06_remedies": ("06_remedies", plots.gap_by_bits),
    "07_ablation_scoring_scheme": ("07_ablation_scoring_scheme", plots.accuracy_by_coreset),
    "07_equal_epochs": ("07_equal_epochs", lambda rows: plots.accuracy_by_coreset(_longest(rows))),
    "08_activation_distributions": ("08_activation_distributions", plots.distributions),
    "08_mismatch": ("08_mismatch", plots.mismatch),
    "09_angles_by_layer": ("09_angles", plots.angles_by_layer),
    "09_angles_by_epoch": ("09_angles", plots.angles_by_epoch),
    "10_untrained_bitwidths": ("10_untrained_bitwidths", lambda rows: plots.accuracy_by_bits(_most_trained(rows))),
    "10_two_trained_bitwidths": ("10_untrained_bitwidths", lambda rows: plots.accuracy_by_bits(_fewest_trained(rows))),
    "11_training_cost": ("11_training_cost", lambda rows: plots.growth(rows, "sample_passes")),
    "11_training_time": ("11_training_cost", lambda rows: plots.growth(rows, "seconds")),
    "12_deploy": ("12_deploy", plots.accuracy_by_size),
    "12_deploy_latency": ("12_deploy", plots.latency),
}


def _ours_on_full_data(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.method.eq("Ours") & rows.pruning_rate.eq(0) & rows.bits.gt(1)]


def _ends_of_correction(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.correction.isin(("none", "mean_var"))]


def _longest(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.epochs.eq(rows.epochs.max())]


def _most_trained(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.trained_bits.eq(max(rows.trained_bits, key=len))]


def _fewest_trained(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows.trained_bits.eq(min(rows.trained_bits, key=len))]


def draw(path: Path) -> "Axes":
    """Draw the figure that `path` names, without suffix, from its CSV in the same folder; write `path`.png.

    The same CSV gives the same bytes. ValueError: no such figure, or no whole CSV of it there.
    """
    path = checks.path("path", path)
    csv, function = FIGURES[checks.choice("path", path.name, FIGURES)]
    rows = path.with_name(f"{csv}.csv")
    if not rows.exists():
        raise checks.invalid("path", str(path), f"{rows.name} beside it, which the notebook writes")
    try:
        table = pd.read_csv(rows)
    except ValueError as error:
        raise checks.invalid("path", str(path), f"a whole {rows.name} beside it ({error})") from error
    ax = function(checks.table("rows", table))
    plots.save(ax, path)
    return ax


def main(folder: Path) -> int:
    """Redraw all figures below `folder`; returns how many."""
    folder = checks.path("folder", folder)
    import matplotlib.pyplot as plt

    paths = [rows.with_name(name) for name, (csv, _) in FIGURES.items() for rows in sorted(folder.rglob(f"{csv}.csv"))]
    for path in paths:
        plt.close(draw(path).figure)
    return len(paths)


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else home() / "results"
    print(f"{main(where)} figures redrawn in {where}")
