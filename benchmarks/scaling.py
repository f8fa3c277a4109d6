"""How the time of a training grows with images, with the network's width and with processes, at 80 % pruning.

`python benchmarks/scaling.py` trains a ResNet-20 at 2, 4 and 8 bits, each case in processes of its own with one thread
each (gloo), and writes a row a case and repeat to results/benchmarks/scaling.csv.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import seaborn as sns
import torch
from common import over_repeats, write
from growth import train_ours
from matplotlib.axes import Axes

import emqlib as emq
from emqlib.paper import plots, runs
from emqlib.train import distributed

REPEATS = 1


@dataclass(frozen=True)
class Case:
    """What one training has."""

    train: int = 1280  # images
    width: int = 16  # channels of the first stage
    processes: int = 1
    epochs: int = 6
    dataset: str = "cifar10"


CASES = [Case(), Case(train=2560), Case(train=5120), Case(width=8), Case(width=32), Case(processes=2)]


def measure(cases: list[Case], repeats: int = REPEATS) -> pd.DataFrame:
    """Rows: the case, repeat, sample_passes (of all processes) and seconds, with their provenance."""
    rows = []
    for repeat in range(repeats):
        for case in cases:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command = [*launch, "--nproc_per_node", str(case.processes), __file__, json.dumps(asdict(case))]
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            told = subprocess.run(command, env=one_thread, check=True, capture_output=True, text=True).stdout
            rows.append(asdict(case) | {"repeat": repeat} | json.loads(told.splitlines()[-1]))
    return pd.DataFrame(rows)


def child(case: Case) -> None:
    """Train, in one of the processes of a case; the main one prints what was found."""
    torch.set_num_threads(1)
    place, data = distributed.current("cpu"), emq.load_dataset(case.dataset).subset(case.train, 10)
    config = emq.TrainConfig(epochs=case.epochs, lr=0.1, warmup_epochs=0.5, device="cpu")
    history = train_ours((2, 4, 8), data, config, case.width)
    found = {"sample_passes": int(history.sample_passes.sum()), "seconds": float(history.seconds.sum())}
    if place.main:
        print(json.dumps(found | runs.provenance(data, torch.device("cpu"), case.processes)))


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a case: sample passes and training time, in those of the first case of the same repeat."""
    case = [rows.train.rename("images"), rows.width.rename("width (channels)"), rows.processes]
    first = rows.groupby("repeat").first()
    passes = rows.sample_passes / rows.repeat.map(first.sample_passes)
    table = passes.groupby(case, sort=False).first().round(2).rename("sample passes (first line = 1)").to_frame()
    times = rows.seconds / rows.repeat.map(first.seconds)
    return table.join(over_repeats(times, case, "training time (first line = 1)", 2)).reset_index()


def figure(rows: pd.DataFrame) -> Axes:
    """The median time of each case."""
    table = summary(rows)
    times, images = table.filter(like="training time").iloc[:, 0], table["images"]
    most, widest = images.idxmax(), table["width (channels)"].idxmax()
    title = f"{images[most] / images[0]:.0f} times as many images take {times[most]:.1f} times as long"
    ax = plots.axes(None, f"{title}, twice as many channels {times[widest]:.1f} times", width=7.2)
    cases = zip(images, table["width (channels)"], table.processes, strict=True)
    labels = [f"{n:,} images, width {width}, {count} process{'es' * (count > 1)}" for n, width, count in cases]
    sns.barplot(x=times, y=labels, orient="h", color=sns.color_palette("colorblind")[0], ax=ax)
    ax.set(xlabel="training time (first line = 1)", ylabel="")
    return ax


if __name__ == "__main__" and len(sys.argv) > 1:
    child(Case(**json.loads(sys.argv[1])))
elif __name__ == "__main__":
    rows = measure(CASES)
    write(Path(__file__).stem, rows, summary(rows), figure(rows))
