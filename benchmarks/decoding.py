"""How many images a second are decoded, cropped and resized to 224 x 224, by the number of worker processes.

`python benchmarks/decoding.py` streams the class folders at $EMQ_DATA/imagenet-sample/val, or another folder given as
argument, and a copy whose images have a shorter side of 375 pixels, as ImageNet's own often have, by each number of
workers in turn, some repeats. It writes results/benchmarks/decoding.csv. Without workers it counts the time of a core,
and also of the way with two copies of each image in memory, which was taken before. Claim: more than by that way.
"""

import os
import sys
import tempfile
from itertools import product
from pathlib import Path
from time import perf_counter, process_time
from unittest import mock

import numpy as np
import pandas as pd
import torch
from common import over_repeats, ranges, write
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from emqlib.paper import runs
from emqlib.train import distributed, sources
from emqlib.train.data import Dataset, Streamed, loader, sha256
from emqlib.train.sources import ImageFiles, list_classes


def listed(folder: Path, workers: int, size: int = 224) -> Dataset:
    """The class folders in `folder` as a data set whose training and test images are the same."""
    found = list_classes(folder)
    classes = tuple(sorted({name for _, name in found}))
    labels = torch.tensor([classes.index(name) for _, name in found])
    for_training, _ = sources.transforms(size, flip=True)
    split = Streamed.of(ImageFiles(folder, [path for path, _ in found], labels, for_training), workers)
    return Dataset(str(folder), split, split, classes, *sources.IMAGENET, True, 0, sha256(split))


def copied(files: ImageFiles, index: int) -> tuple[Tensor, int]:
    """An item of `files` by way of a copy in RGB, whatever it was, and one with a plane for each colour."""
    with Image.open(files.path(index), formats=sources.FORMATS) as image:
        planes = np.asarray(image.convert("RGB")).transpose(2, 0, 1).copy()
    return files.transform(torch.from_numpy(planes)), int(files.targets[index])


def enlarged(folder: Path, to: Path, side: int = 375) -> Path:
    """A copy of the class folders in `folder`, in `to`, of images with that shorter side."""
    for path, name in list_classes(folder):
        place = to / name / f"{path.stem}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(path).convert("RGB")
        scale = side / min(image.size)
        image.resize([round(scale * length) for length in image.size], Image.Resampling.BICUBIC).save(place, quality=90)
    return to


def measure(folder: Path, workers: tuple[int, ...] = (0, 1, 2), repeats: int = 3, batch: int = 50) -> pd.DataFrame:
    """Rows: repeat, way, workers, images a second; each after a pass that starts the workers and reads the files once.

    The ways are "now" and, without workers, "with copies". Workers are timed by the clock, on an idle machine.
    """
    cpu, rows = torch.device("cpu"), []
    live = {("now", w): loader(listed(folder, w), "train", cpu) for w in workers}
    live[("with copies", 0)] = loader(listed(folder, 0), "train", cpu)
    for repeat, ((way, w), batches) in product(range(-1, repeats), live.items()):
        chunks, seed = torch.arange(len(batches.split)).split(batch), torch.Generator().manual_seed(repeat + 1)
        item = copied if way == "with copies" else ImageFiles.__getitem__
        clock = perf_counter if w else process_time
        with mock.patch.object(ImageFiles, "__getitem__", item):
            start = clock()
            n = sum(len(indices) for *_, indices in batches.epoch(chunks, seed))
            rate = n / (clock() - start)
        rows.append({"repeat": repeat, "way": way, "workers": w, "images": n, "images a second": rate})
    table = pd.DataFrame(rows[len(live) :]).assign(cpus=os.cpu_count(), folder=folder.name)
    return table.assign(**runs.provenance(listed(folder, 0), distributed.device_named("cpu")))


def _named(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with images, way and worker processes in words."""
    folders = rows.folder.replace({"val": "images as they are", "enlarged": "enlarged images"})
    ways = rows.way.replace("now", "without copies")
    return rows.assign(images=folders, way=ways).rename(columns={"workers": "worker processes"})


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a folder, way and number of workers: images a second."""
    named = _named(rows)
    case = [named[name] for name in ("images", "way", "worker processes")]
    return over_repeats(named["images a second"], case, "images a second", 0).reset_index()


def figure(rows: pd.DataFrame) -> Axes:
    """Images a second of each repeat, by way and worker processes."""
    speeds = rows[rows.workers == 0].groupby(["folder", "way"], sort=False)["images a second"].median().unstack()
    gains = speeds["now"] / speeds["with copies"]
    title = f"Without copies, a process decodes and crops {gains.min():.2f} to {gains.max():.2f} times as many images"
    named = _named(rows)
    workers = named["worker processes"].map(lambda count: f", {count} worker processes" if count else "")
    named = named.assign(case=named.images + ", " + named.way + workers)
    return ranges(named, "case", "images a second", title, "images a second")


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(os.environ.get("EMQ_DATA", "data"), "imagenet-sample/val")
    if place.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            rows = pd.concat([measure(place), measure(enlarged(place, Path(folder, "enlarged")))])
        write("decoding", rows, summary(rows), figure(rows))
    else:
        print(f"{place}: no such folder, decoding is not measured")
