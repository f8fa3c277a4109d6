"""Images as uint8 tensors: where data sets are found, how they are read, normalised and augmented.

A data set is one row of `SOURCES`; everything below that table treats all of them alike.
"""

import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100

from . import checks, files
from .images import ImageFiles, Labelled, list_annotated, list_classes, load_images, pixels

Triple = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Split:
    """Images (N, 3, H, W) uint8 and their labels (N,) int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Number of images, N."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        """The same images and labels on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> "Split":
        """The samples at `indices` (K,) alone."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split with all that training needs to know of them."""

    name: str
    train: Split | ImageFiles  # in memory, or streamed
    test: Split | ImageFiles
    classes: tuple[str, ...]  # label i means classes[i]
    mean: Triple  # of the pixels of each channel, in [0, 1]
    std: Triple
    flip: bool  # augmentation: may training images be mirrored?
    crop_padding: int  # augmentation: by how many pixels may they be shifted?
    sha256: str  # of all pixels and labels (streamed: see `ImageFiles.listing`): which data was this

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.classes)

    def about(self) -> dict[str, Any]:
        """What a trained network has to say of its data: name, checksum, number of classes, mean and std of pixels."""
        about = {"name": self.name, "sha256": self.sha256, "num_classes": self.num_classes}
        return about | {"mean": list(self.mean), "std": list(self.std)}

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with its tensors on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def subset(self, train: int, test: int) -> "Dataset":
        """The first images of each class: `train` and `test` images in all, classes equally often to within one.

        Deterministic, in the original order. A class with too few images leaves its places to the others.
        ValueError: `train` or `test` is not in 1 to the number of images there are.
        """
        train_split = _first_of_each_class(self.train, checks.integer("train", train, 1, len(self.train)))
        test_split = _first_of_each_class(self.test, checks.integer("test", test, 1, len(self.test)))
        return replace(self, train=train_split, test=test_split, sha256=_sha256(train_split, test_split))


def load_dataset(
    name: str,
    root: str | Path | None = None,
    image_size: int | None = None,
    stream: bool | None = None,
    workers: int | None = None,
) -> Dataset:
    """Read a data set into memory, on the CPU, or list the files of one to be streamed.

    name: "digits", "cifar10", "cifar100", "tinyimagenet", "imagenet", or "imagefolder:PATH" for any folder that holds
        train/<class>/* and test/<class>/* (or val/<class>/*).
    root: where the files are; None: the environment variable EMQ_DATA, else data/ in `files.home()`.
        Looked for there: the official files, then <name>/{train,test}/<class>/*; then CIFAR is downloaded.
    image_size: resize the shorter side to this many pixels and cut out the centre; None: images as they are. Streamed
        images (None: 224) are cropped and resized at random for training, and normalised, as usual for ImageNet.
    stream: decode the files of class folders in each epoch, in `workers` processes, instead of once; None: ImageNet
        alone, which fits no memory. workers: None for the CPUs there are for this process, at most 16; 0 for none.
    ValueError: unknown `name`, images of unequal size, a damaged image, missing or unexpected classes, stream=True for
    what are no files of single images. FileNotFoundError: no data; says where it was looked for and how to get it.
    ImportError: the digits without scikit-learn.
    """
    source, path = SOURCES[check_name("name", name)], str(name).partition(":")[2]
    if image_size is not None:
        image_size = checks.integer("image_size", image_size, 1, 4096)
    streamed = source.stream if stream is None else checks.flag("stream", stream)
    workers = _workers() if workers is None else checks.integer("workers", workers, 0, 1024)
    usual = os.environ.get("EMQ_DATA") or files.home() / "data"
    try:
        place = checks.path("root", path or (usual if root is None else root))
    except ValueError:
        if not path:
            raise
        raise checks.invalid("name", name, "imagefolder:PATH with the path of a folder") from None
    folder = Path(os.path.expanduser(place)).absolute()
    train, test, classes = _find(name, source, folder, Reading(image_size, streamed, workers))
    if streamed and not isinstance(train, ImageFiles):
        raise checks.invalid("stream", True, f"False for {name!r}, which was found as whole files")
    mean, std = source.statistics or (IMAGENET if streamed else _statistics(train.images))
    return Dataset(name, train, test, classes, mean, std, source.flip, source.crop_padding, _sha256(train, test))


def check_name(parameter: str, name: Any) -> str:
    """The key of `SOURCES` that `name` means; ValueError, which names the parameter, where there is none."""
    kind, _, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    key = f"{kind}:PATH" if path else name
    return key if isinstance(key, str) and key in SOURCES else checks.choice(parameter, name, SOURCES)


def _workers() -> int:
    """The CPUs of this process, shared with those of other ranks on this machine."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # Linux, others
    return max(1, min(16, own // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def normalize(images: Tensor, dataset: Dataset) -> Tensor:
    """(images / 255 - mean) / std for each channel: (B, 3, H, W) uint8 to float32, on the images' device."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (dataset.mean, dataset.std))
    return (images * (1 / (255 * std))).sub_(mean / std)  # the same, in two passes over memory instead of four


def augment(images: Tensor, dataset: Dataset, generator: torch.Generator) -> Tensor:
    """Mirror each image with probability 1/2 and shift it by up to `crop_padding` pixels, zeros moving in.

    images: (B, 3, H, W) uint8 on any device; returns the same shape. What `dataset` does not ask for is left out.
    generator: a CPU generator, so that every device sees the same draws: B flips, then 2 x B offsets.
    """
    batch, _, height, width = images.shape
    if dataset.flip:
        mirrored = (torch.rand(batch, generator=generator) < 0.5).to(images.device)
        images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    if dataset.crop_padding:
        pad = dataset.crop_padding
        top, left = torch.randint(2 * pad + 1, (2, batch), generator=generator).to(images.device)
        # a view of all (2 pad + 1)^2 crops of each image, of which one is copied
        crops = F.pad(images, [pad] * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = crops[torch.arange(batch, device=images.device), :, top, left]
    return images


def _rank_in_class(labels: Tensor) -> Tensor:
    """How many earlier samples have the same label: (N,) to (N,).

    >>> _rank_in_class(torch.tensor([7, 7, 3, 7]))
    tensor([0, 1, 0, 2])
    """
    ordered, order = labels.sort(stable=True)
    position = torch.arange(len(labels), device=labels.device)
    return torch.empty_like(labels).index_copy_(0, order, position - torch.searchsorted(ordered, ordered))


def _first_of_each_class(split: Split | ImageFiles, count: int) -> Split | ImageFiles:
    by_class = split.labels.argsort(stable=True)
    ranks = _rank_in_class(split.labels)[by_class]
    by_rank = by_class[ranks.argsort(stable=True)]  # first of each, second of each, ...
    return split.take(by_rank[:count].sort().values)


def _statistics(images: Tensor) -> tuple[Triple, Triple]:
    """Mean and standard deviation of each channel, in [0, 1], from exact counts of the 256 values."""
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in images.unbind(1)])
    share, value = counts.double() / counts[0].sum(), torch.arange(256).double() / 255
    mean = share @ value
    std = (share * (value - mean[:, None]) ** 2).sum(1).sqrt()
    std[std < 1e-6] = 1  # a constant channel: nothing to scale, and no division by zero
    return tuple(mean.tolist()), tuple(std.tolist())


def _sha256(*splits: Split | ImageFiles) -> str:
    total = hashlib.sha256()
    for split in splits:
        if isinstance(split, ImageFiles):
            total.update(split.listing())
            continue
        for tensor in (split.images, split.labels):
            total.update(str(tuple(tensor.shape)).encode())
            total.update(tensor.cpu().contiguous().view(-1).numpy())
    return total.hexdigest()


# Finding and reading. A reader is given a place and returns both splits and the class names, or raises
# FileNotFoundError, whose text says what is missing there, so that the next place is tried.

Contents = tuple[Split | ImageFiles, Split | ImageFiles, tuple[str, ...]]


@dataclass(frozen=True)
class Reading:
    """How `load_dataset` was asked to read: see its arguments."""

    image_size: int | None
    stream: bool
    workers: int


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is known of a data set before its files are read."""

    places: tuple[tuple[str, Callable[[Path, "Source", Reading], Contents]], ...]  # under root, first one wins
    how_to_get: str  # the end of the message where there is no data
    num_classes: int | None = None  # that class folders must have; None: any
    statistics: tuple[Triple, Triple] | None = None  # mean and std; None: of the training images
    flip: bool = True
    crop_padding: int = 4
    official: Any = None  # torchvision's class
    stream: bool = False


def _find(name: str, source: Source, root: Path, how: Reading) -> Contents:
    """What the first place that has the data holds; FileNotFoundError that names all places otherwise."""
    looked = []
    for place, read in source.places:
        try:
            return read(root / place, source, how)
        except FileNotFoundError as error:
            looked.append(f"  {error}")
    raise FileNotFoundError("\n".join([f"no data for {name!r}. Looked in:", *looked, source.how_to_get]))


def _digits(_: Path, source: Source, how: Reading) -> Contents:
    """scikit-learn's handwritten digits, (1797, 8, 8) of 0 to 16; every fifth of a class is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits are part of scikit-learn: pip install "emqlib[notebook]"') from error
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(small, size=how.image_size or 32, mode="bilinear").round().byte().repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    is_test = _rank_in_class(labels) % 5 == 4
    train, test = (Split(images[rows], labels[rows]) for rows in (~is_test, is_test))
    return train, test, tuple(str(digit) for digit in digits.target_names)


def _official_cifar(folder: Path, source: Source, how: Reading, download: bool = False) -> Contents:
    """torchvision's files, checksums verified."""
    if not download and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    try:
        parts = [source.official(folder.parent, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(f"{folder}: incomplete or damaged (checksums differ)") from error
    if how.image_size is not None:
        for part in parts:
            part.data = np.stack([pixels(Image.fromarray(image), how.image_size) for image in part.data])
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    train, test = (Split(images[i], torch.tensor(part.targets)) for i, part in enumerate(parts))
    return train, test, tuple(parts[0].classes)


def _download_cifar(root: Path, source: Source, how: Reading) -> Contents:
    """Let torchvision download into `root`, and read that. What it left half done fails its checksums next time."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds without an answer: a machine without a network must hear so at once
    try:
        return _official_cifar(root / source.official.base_folder, source, how, download=True)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(f"{source.official.url}: download failed ({error})") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _class_folders(folder: Path, source: Source, how: Reading) -> Contents:
    """train/<class>/* and test/<class>/* or val/<class>/*; labels follow the sorted names, as CIFAR's own do."""
    held_out = folder / "test"
    labelled = held_out.is_dir() and any(entry.is_dir() for entry in held_out.iterdir())  # ImageNet's is not
    if not labelled and (folder / "val").is_dir():
        held_out = folder / "val"
    return _splits(folder, list_classes(folder / "train"), list_classes(held_out), source, how)


def _tiny_imagenet(folder: Path, source: Source, how: Reading) -> Contents:
    """train/<wnid>/images/* and val/images/* with val/val_annotations.txt; the test split has no labels."""
    train = list_classes(folder / "train", inner="images")
    annotations = folder / "val" / "val_annotations.txt"
    if not annotations.is_file():
        raise FileNotFoundError(f"{annotations}: no such file")
    return _splits(folder, train, list_annotated(annotations, folder / "val" / "images", "\t"), source, how)


def _kaggle(folder: Path, source: Source, how: Reading) -> Contents:
    """ILSVRC as Kaggle packs it: train/<wnid>/*, val/* in one folder, and LOC_val_solution.csv beside ILSVRC/."""
    answers = folder.parents[2] / "LOC_val_solution.csv"  # beside ILSVRC/
    if not (folder / "val").is_dir() or not answers.is_file():
        raise FileNotFoundError(f"{folder / 'val'} with {answers}: not both there")
    val = sorted(list_annotated(answers, folder / "val", ",", suffix=".JPEG", skip=1))
    return _splits(folder, list_classes(folder / "train"), val, source, how)


def _splits(folder: Path, train: Labelled, test: Labelled, source: Source, how: Reading) -> Contents:
    classes = tuple(sorted({name for _, name in train}))
    if source.num_classes not in (None, len(classes)):
        raise ValueError(f"{folder / 'train'}: expected {source.num_classes} classes, found {len(classes)}")
    index = {name: i for i, name in enumerate(classes)}
    for path, name in test:
        if name not in index:
            raise ValueError(f"{path}: its class {name!r} has no images for training in {folder / 'train'}")
    paths, labels = [path for path, _ in train + test], torch.tensor([index[name] for _, name in train + test])
    n = len(train)
    if how.stream:
        both = (
            ImageFiles.of(folder, *part, how.image_size, how.workers)
            for part in ((paths[:n], labels[:n]), (paths[n:], labels[n:]))
        )
        return *both, classes
    images = load_images(folder, paths, how.image_size)
    return Split(images[:n], labels[:n]), Split(images[n:], labels[n:]), classes


_ELSEWHERE = "or point root= or the environment variable EMQ_DATA at the folder that holds it."


def _cifar(name: str, official: Any, num_classes: int, mean: Triple, std: Triple) -> Source:
    return Source(
        places=((official.base_folder, _official_cifar), (name, _class_folders), ("", _download_cifar)),
        how_to_get=f"Unpack {official.url} there, {_ELSEWHERE}",
        num_classes=num_classes,
        statistics=(mean, std),
        official=official,
    )


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation, as torchvision's models have

SOURCES = {
    "digits": Source(places=(("", _digits),), how_to_get="", flip=False, crop_padding=2),
    "cifar10": _cifar("cifar10", CIFAR10, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": _cifar("cifar100", CIFAR100, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tinyimagenet": Source(
        places=(("tiny-imagenet-200", _tiny_imagenet), ("tinyimagenet", _class_folders)),
        how_to_get="Unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there, so that tiny-imagenet-200/ has "
        f"train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt, {_ELSEWHERE}",
        num_classes=200,
        statistics=((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
        crop_padding=8,
    ),
    "imagenet": Source(
        places=(("imagenet", _class_folders), ("ILSVRC/Data/CLS-LOC", _kaggle)),
        how_to_get="ImageNet-1K is not to be downloaded freely: get ILSVRC2012 from image-net.org and unpack it with "
        "torchvision.datasets.ImageNet, or from Kaggle as ILSVRC/, so that imagenet/train/<wnid>/*.JPEG and "
        f"imagenet/val/<wnid>/*.JPEG lie there (150 GB), {_ELSEWHERE}",
        num_classes=1000,
        statistics=IMAGENET,
        stream=True,
    ),
    "imagefolder:PATH": Source(
        places=(("", _class_folders),),
        how_to_get="Expected PATH/train/<class>/* and PATH/test/<class>/* (or PATH/val/<class>/*).",
    ),
}
