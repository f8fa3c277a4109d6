"""What recording importance scores costs a training step: scored and plain runs, alternating in one process.

`python benchmarks/recording.py` writes a row a score and repeat to results/benchmarks/recording.csv, and prints the
median, lowest and highest ratio of each score. Claim: at most 1.05.
"""

from dataclasses import replace

import pandas as pd
from common import ranges, write
from matplotlib.axes import Axes

import emqlib as emq
from emqlib.paper import runs
from emqlib.train import distributed

SCORES = ("tdds", "el2n", "grand", "forgetting", "moderate", "entropy")


def measure(data: emq.Dataset, scores: tuple[str, ...] = SCORES, repeats: int = 5, epochs: int = 3) -> pd.DataFrame:
    """Rows: score, repeat, classes, seconds of as many steps with and without recording, and their ratio.

    Both train a ResNet-8 at 2, 4 and 8 bits on all of `data`; the scored run's last epoch, on coresets, is left out.
    """
    plain = emq.TrainConfig(epochs=epochs, autocast="bfloat16")
    _seconds(data, plain, epochs)  # allocates and compiles what later runs find there
    rows = []
    for repeat in range(repeats):
        for score in scores:
            coreset = emq.CoresetConfig(score=score, pruning_rate=0.5, scoring_epochs=epochs)
            without = _seconds(data, plain, epochs)
            scored = _seconds(data, replace(plain, epochs=epochs + 1, coreset=coreset), epochs)
            row = {"score": score, "repeat": repeat, "classes": data.num_classes, "plain": without, "scored": scored}
            rows.append(row | {"ratio": scored / without})
    return pd.DataFrame(rows).assign(**runs.provenance(data, distributed.device_named("auto"), autocast=plain.autocast))


def _seconds(data: emq.Dataset, config: emq.TrainConfig, epochs: int) -> float:
    model = emq.convert(emq.models.resnet8(data.num_classes), emq.QuantSpec(bits=(2, 4, 8)))
    return float(emq.train(model, data, config, progress=False).seconds[:epochs].sum())


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a score: the median, lowest and highest ratio."""
    return rows.groupby(["score", "classes"], sort=False).ratio.agg(["median", "min", "max"]).round(3).reset_index()


def figure(rows: pd.DataFrame) -> Axes:
    """The ratio of each repeat, a line a score."""
    title = "Training steps that record scores"
    return ranges(rows, "score", "ratio", title, "time, without recording = 1", mark=1.05)


if __name__ == "__main__":
    rows = measure(emq.load_dataset("cifar10").subset(640, 10))
    write("recording", rows, summary(rows), figure(rows))
