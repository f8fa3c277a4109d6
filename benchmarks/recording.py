"""What recording importance scores costs training: its part of the processor's time of the same epochs.

`python benchmarks/recording.py` writes a row a score and repeat to results/benchmarks/recording.csv, and prints the
median, lowest and highest ratio of each score: the time of a scoring phase with recording to that without. Both are
times of the processor in one run, which other work on the machine disturbs far less than the seconds of two runs.
Claim: at most 1.05.
"""

from time import process_time
from typing import Any
from unittest import mock

import pandas as pd
from common import over_repeats, ranges, write
from matplotlib.axes import Axes

import emqlib as emq
from emqlib.paper import runs, tables
from emqlib.train import distributed

SCORES = ("tdds", "el2n", "grand", "forgetting", "moderate", "entropy")
RECORDING = ("observe", "_keep_last")  # methods of `Coresets` that work in the scoring phase alone


def measure(data: emq.Dataset, scores: tuple[str, ...] = SCORES, repeats: int = 5, epochs: int = 3) -> pd.DataFrame:
    """Rows: score, repeat, classes, processor seconds of a scoring phase, of recording in it, and the ratio.

    It trains a ResNet-8 at 2, 4 and 8 bits on all of `data`; the last epoch, on coresets, is left out.
    """
    rows = []
    for repeat in range(repeats + 1):
        for score in scores:
            coreset = emq.CoresetConfig(score=score, pruning_rate=0.5, scoring_epochs=epochs)
            config = emq.TrainConfig(epochs=epochs + 1, autocast="bfloat16", seed=repeat, coreset=coreset)
            whole, recording = _seconds(data, config, epochs)
            row = {"score": score, "repeat": repeat - 1, "classes": data.num_classes, "epochs": whole}
            rows.append(row | {"recording": recording, "ratio": whole / (whole - recording)})
    table = pd.DataFrame(rows[len(scores) :])  # the first round allocates what later ones find there
    return table.assign(**runs.provenance(data, distributed.device_named("auto"), autocast="bfloat16"))


def _seconds(data: emq.Dataset, config: emq.TrainConfig, epochs: int) -> tuple[float, float]:
    """The processor's seconds of the first `epochs`, and those of recording in them."""
    spent, ends = [0.0], [process_time()]

    def timed(method: Any) -> Any:
        def call(*args: Any) -> Any:
            start = process_time()
            found = method(*args)
            spent[0] += process_time() - start
            return found

        return call

    methods = {name: timed(getattr(emq.Coresets, name)) for name in RECORDING}
    model = emq.convert(emq.models.resnet8(data.num_classes), emq.QuantSpec(bits=(2, 4, 8)))
    with mock.patch.multiple(emq.Coresets, **methods):
        emq.train(model, data, config, progress=False, observe=lambda _: ends.append(process_time()))
    return ends[epochs] - ends[0], spent[0]


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a score: processor time with recording, where it is 1 without."""
    case = [rows.score.map(tables.in_words), rows.classes]
    return over_repeats(rows.ratio, case, "processor time (without recording = 1)", 3).reset_index()


def figure(rows: pd.DataFrame) -> Axes:
    """What each repeat took more, a line a score."""
    more = rows.assign(more=100 * (rows.ratio - 1), score=rows.score.map(tables.in_words))
    most = more.groupby("score").more.median().max()
    title = f"Recording scores takes at most {most:.1f} % more processor time"
    return ranges(more, "score", "more", title, "additional processor time (%)", (5, "claim: at most 5 %"))


if __name__ == "__main__":
    rows = measure(emq.load_dataset("cifar10").subset(640, 10))
    write("recording", rows, summary(rows), figure(rows))
