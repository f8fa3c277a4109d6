"""Data sets: inputs and labels that lie in memory or are read when needed, normalized, augmented and batched."""

import contextlib
import hashlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from .. import checks, files
from .distributed import Place

INPUTS, LABELS = ("pixel_values", "image"), ("label", "labels")  # what an item that is a dict may call them
CROP = 224 / 256  # of a streamed test image, the part of the shorter side that stays
ITEM = """an item (input, label) or {"image": input, "label": label}, whose input is a tensor of bytes or floats; of a
picture, a transform such as torchvision's v2.ToImage() makes one"""


@dataclass(frozen=True, eq=False)
class Split:
    """Inputs (N, C, ...), bytes or floats, and their labels (N,) int64, on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Split":
        """The same inputs and labels on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, indices: Tensor) -> "Split":
        """The samples at `indices` (K,) alone."""
        return Split(self.images[indices], self.labels[indices])


class Damaged(ValueError):
    """A file that is not readable. In a streamed data set such a sample is left out, if there are only few."""


Key = tuple[int | None, int, np.ndarray]  # of a batch: seed of the epoch, if any; number of the chunk; samples (B,)


@dataclass(frozen=True, eq=False)
class Streamed:
    """A split of N samples, which worker processes read from a map-style dataset when they are needed.

    Where the dataset has a method `listing(rows)`, as `sources.ImageFiles` does, checksums are made of what that gives.
    """

    items: Any  # the dataset
    rows: Tensor  # (N,), which of its items these are
    labels: Tensor  # (N,) int64
    workers: int  # how many processes read

    @classmethod
    def of(cls, items: Any, workers: int, name: str = "data") -> "Streamed":
        """All items of a map-style dataset, see `Dataset.from_dataset`; `name` is what errors call it."""
        other = (str, bytes, Mapping, Tensor, np.ndarray, IterableDataset)
        sized = hasattr(items, "__len__") and hasattr(items, "__getitem__") and not isinstance(items, other)
        if not sized or len(items) == 0:
            expected = "a map-style dataset of one item at least: its length is known, and items[i] is (input, label)"
            raise checks.invalid(name, items, expected)
        return cls(items, torch.arange(len(items)), _labels(items), workers)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Streamed":
        """Itself: what is read goes to a device, the dataset stays."""
        return self

    def take(self, indices: Tensor) -> "Streamed":
        """The samples at `indices` (K,) alone."""
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])

    def path(self, index: int) -> Any:
        """The file of a sample, of a data set of files."""
        return self.items.path(int(self.rows[index]))

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        """A batch: the samples (B,) that are whole, their inputs, and the others with what is wrong with them."""
        (seed, chunk, indices), whole, images, damaged = key, [], [], []
        with _seeding() as start:
            for index in indices.tolist():
                # what is random in a sample depends on the seed of the epoch, the number of the chunk and it alone
                start(int(files.digest(f"{seed},{chunk},{index}")[:15], 16))
                try:
                    images.append(self._input(index))
                    whole.append(index)
                except Damaged as error:
                    damaged.append((index, str(error)))
        kinds = sorted({_kind(image) for image in images})
        if len(kinds) > 1:
            raise checks.invalid("data", " and ".join(kinds), "inputs of one shape and type in a batch")
        stacked = torch.stack(images) if images else torch.empty(0)
        return torch.tensor(whole, dtype=torch.long), stacked, damaged

    def _input(self, index: int) -> Tensor:
        row, known = int(self.rows[index]), int(self.labels[index])
        image, label = _pair(self.items[row])
        if label != known:
            raise checks.invalid("label", label, f"{known} for item {row}, as the dataset's labels say")
        return image


def _pair(item: Any) -> tuple[Tensor, int]:
    """Input and label of a dataset's item; ValueError: it is not what an item should be."""
    if isinstance(item, Mapping):
        image, label = (next((item[key] for key in keys if key in item), None) for keys in (INPUTS, LABELS))
    else:
        image, label = item if isinstance(item, (tuple, list)) and len(item) == 2 else (None, None)
    if isinstance(image, np.ndarray):
        image = _tensor(image)
    if not isinstance(image, Tensor) or not _is_input(image):
        raise checks.invalid("data", _kind(image) if isinstance(image, Tensor) else item, ITEM)
    image = image.float() if image.dtype == torch.float64 else image  # as of `from_tensors`
    return image.as_subclass(Tensor), checks.integer("label", label, 0)


def _is_input(images: Tensor) -> bool:
    return images.dtype == torch.uint8 or images.is_floating_point()


def _tensor(given: Any) -> Tensor | None:
    """A tensor, array or list of numbers as a tensor; None for anything else."""
    with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
        if isinstance(given, np.ndarray):  # PyTorch takes neither reversed arrays nor those of the other byte order
            given = given.astype(given.dtype.newbyteorder("="), order="C", copy=False)
        return given.detach() if isinstance(given, Tensor) else torch.tensor(given)
    return None


def _labels(items: Any) -> Tensor:
    """The labels (N,) of a map-style dataset, without reading its items where it tells them."""
    if isinstance(items, Subset):
        return _labels(items.dataset)[torch.as_tensor(items.indices)]
    told = None
    if hasattr(items, "with_format"):  # HuggingFace
        told = next((items.with_format(None)[key][:] for key in LABELS if key in items.column_names), None)
    elif getattr(items, "target_transform", None) is None:  # torchvision
        told = getattr(items, "targets", getattr(items, "labels", None))
    found = integers(told, len(items))
    if found is not None:
        return found
    with _seeding() as start:
        start(0)
        return torch.tensor([_pair(items[i])[1] for i in range(len(items))])


def integers(given: Any, count: int) -> Tensor | None:
    """`given` as a tensor (N,) of integers >= 0, or None where it is something else."""
    found = _tensor(given)
    if found is None or found.shape != (count,) or found.dtype == torch.bool or found.is_floating_point():
        return None
    return None if found.is_complex() or found.long().min() < 0 else found.long()


@contextlib.contextmanager
def _seeding() -> Iterator[Callable[[int], None]]:
    """Seeds the global generators of PyTorch, NumPy and Python within the block; afterwards they are as before."""
    states = random.getstate(), np.random.get_state()

    def seed(number: int) -> None:
        torch.default_generator.manual_seed(number)
        np.random.seed(number % 2**32)
        random.seed(number)

    try:
        with torch.random.fork_rng(devices=[]):
            yield seed
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split with all that training needs to know of them."""

    name: str
    train: Split | Streamed
    test: Split | Streamed
    classes: tuple[str, ...]  # label i means classes[i]
    mean: tuple[float, ...]  # of each channel, or one for all; of bytes, which count as numbers in [0, 1]
    std: tuple[float, ...]
    flip: bool  # augmentation in memory: may training images be mirrored?
    crop_padding: int  # augmentation in memory: by how many pixels may they be shifted?
    sha256: str  # of all inputs and labels (streamed: see `sha256`): which data was this

    @classmethod
    def from_tensors(
        cls,
        images: Any,
        labels: Any,
        test_images: Any = None,
        test_labels: Any = None,
        *,
        name: str = "tensors",
        classes: Sequence[str] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        flip: bool = False,
        crop_padding: int = 0,
    ) -> "Dataset":
        """Inputs and labels of your own that lie in memory, as tensors or arrays.

        Args:
            images: images (N, C, H, W), signals (N, C, L) or feature vectors (N, D), of bytes or floats.
            labels: (N,), integers from 0 on.
            test_images: of the same kind, for `evaluate`; None: no test split.
            test_labels: (M,).
            name: what results call the data.
            classes: the name of each class; None: "0", "1" and so on.
            mean: what is subtracted from each channel; None: its mean over all training inputs. Bytes count as numbers
                in [0, 1].
            std: what each channel is divided by; None: its standard deviation.
            flip: whether training images are mirrored at random.
            crop_padding: by up to how many pixels training images are shifted at random.

        Raises:
            ValueError: no inputs, inputs or labels of another kind, unequal lengths, too few names of classes.
        """
        train = _split("", images, labels)
        given = test_images is not None or test_labels is not None
        test = _split("test_", test_images, test_labels) if given else train.take(torch.arange(0))
        if test.images.shape[1:] != train.images.shape[1:] or test.images.dtype != train.images.dtype:
            expected = f"the same as of `images`, {_kind(train.images)}"
            raise checks.invalid("test_images", _kind(test.images), expected)
        flip, crop_padding = checks.flag("flip", flip), checks.integer("crop_padding", crop_padding, 0, 4096)
        if (flip or crop_padding) and train.images.dim() != 4:
            raise checks.invalid("images", _kind(train.images), "images (N, C, H, W) to mirror or to shift")
        found = statistics(train.images) if mean is None or std is None else (mean, std)
        name, names = checks.instance("name", name, str, "a text"), _classes(classes, train, test)
        mean = _of_channels("mean", found[0] if mean is None else mean, train.images)
        std = _of_channels("std", found[1] if std is None else std, train.images)
        return cls(name, train, test, names, mean, std, flip, crop_padding, sha256(train, test))

    @classmethod
    def from_dataset(
        cls,
        train: Any,
        test: Any = None,
        *,
        name: str = "dataset",
        classes: Sequence[str] | None = None,
        num_workers: int = 0,
    ) -> "Dataset":
        """Map-style datasets of your own, such as torchvision's and HuggingFace's, whose items are read in each epoch.

        An item is (input, label), or a dict with "image" or "pixel_values" and "label" or "labels". The input is what
        the network takes, from transforms of your own: it is neither normalized nor augmented further, except that
        bytes become numbers in [0, 1]. Labels are read once: from `targets`, `labels` or a column where the dataset has
        these, else from all its items. Random transforms draw the same whatever the number of workers.

        `sha256` is of the labels and the first and the last input of each split: a change of others goes unnoticed.

        Args:
            train: for training.
            test: for `evaluate`; None: no test split.
            name: as of `from_tensors`, like `classes`.
            num_workers: how many processes read items; 0: this one does.

        Raises:
            ValueError: no map-style dataset, no items, an item of another kind, too few names of classes.
        """
        workers = checks.integer("num_workers", num_workers, 0, 1024)
        first = Streamed.of(train, workers, "train")
        second = first.take(torch.arange(0)) if test is None else Streamed.of(test, workers, "test")
        name, names = checks.instance("name", name, str, "a text"), _classes(classes, first, second)
        return cls(name, first, second, names, (0.0,), (1.0,), False, 0, sha256(first, second))

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return len(self.classes)

    def about(self) -> dict[str, Any]:
        """What a trained network has to say of its data: name, checksum, number of classes, mean and std of pixels.

        For streamed images it adds `crop`, the part of the shorter side that test images keep. Mean and std are
        left out for a dataset with transforms of its own, which may already normalize, and for floats beyond [0, 1],
        which are no pixels.
        """
        about = {"name": self.name, "sha256": self.sha256, "num_classes": self.num_classes}
        normalized = about | {"mean": list(self.mean), "std": list(self.std)}
        if isinstance(self.train, Streamed):
            return normalized | {"crop": CROP} if hasattr(self.train.items, "listing") else about
        x = self.train.images
        own = x.is_floating_point() and not bool(((x >= 0) & (x <= 1)).all())
        return about if own else normalized

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data set with its tensors on `device`."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def subset(self, train: int, test: int) -> "Dataset":
        """The first samples of each class: `train` and `test` samples in all, classes equally often to within one.

        The original order stays. A class with too few samples leaves its places to the others. ValueError: `train` or
        `test` is not between 1 and the number of samples there are.
        """
        train_split = _first_of_each_class(self.train, checks.integer("train", train, 1, len(self.train)))
        low = min(1, len(self.test))  # there may be no test split
        test_split = _first_of_each_class(self.test, checks.integer("test", test, low, len(self.test)))
        return replace(self, train=train_split, test=test_split, sha256=sha256(train_split, test_split))

    def validation(self, count: int) -> "Dataset":
        """Hold out `count` training samples, the last of each class, in place of the test split.

        The same fraction of each class is held out. Files of images are then transformed as test images are; items of a
        dataset of your own keep its transforms. A choice made on what is held out, such as a learning rate, is not made
        on test images. ValueError: `count` is not between 1 and one less than the number of training samples.
        """
        checks.integer("count", count, 1, len(self.train) - 1)
        labels = pd.Series(self.train.labels.cpu().numpy())
        of_class = labels.groupby(labels)
        part = (of_class.cumcount(ascending=False) + 0.5) / of_class.transform("size")  # from the end of the class
        order = torch.tensor(part.sort_values(kind="stable").index.to_numpy())
        train_split, held_out = (self.train.take(part.sort().values) for part in (order[count:], order[:count]))
        if isinstance(held_out, Streamed) and hasattr(held_out.items, "seen_as"):  # `sources.ImageFiles`
            held_out = replace(held_out, items=held_out.items.seen_as(self.test.items))
        return replace(self, train=train_split, test=held_out, sha256=sha256(train_split, held_out))


def as_dataset(data: Any) -> Any:
    """A map-style dataset as a `Dataset`, whose items are to train on and to test on; anything else as it is."""
    hugging_face = hasattr(data, "with_format") and hasattr(data, "column_names")
    if hugging_face or (isinstance(data, torch.utils.data.Dataset) and not isinstance(data, IterableDataset)):
        made = Dataset.from_dataset(data)
        return replace(made, test=made.train)
    return data


def _split(prefix: str, images: Any, labels: Any) -> Split:
    """A split of tensors or arrays; ValueError names the parameters, which begin with `prefix`."""
    inputs = _tensor(images)
    if inputs is None or inputs.dim() < 2 or inputs.numel() == 0 or not _is_input(inputs):
        expected = "a tensor (N, C, ...) or (N, D) of bytes or floats, of one sample at least"
        raise checks.invalid(f"{prefix}images", images if inputs is None else _kind(inputs), expected)
    found = integers(labels, len(inputs))
    if found is None:
        raise checks.invalid(f"{prefix}labels", labels, f"{len(inputs)} integers >= 0, one for each input")
    return Split(inputs if inputs.dtype == torch.uint8 else inputs.float(), found.to(inputs.device))


def _kind(images: Tensor) -> str:
    return f"{images.dtype} {tuple(images.shape)}"


def _classes(given: Any, *splits: Split | Streamed) -> tuple[str, ...]:
    """The names of the classes, see `Dataset.from_tensors`."""
    count = 1 + max(int(split.labels.max()) for split in splits if len(split))
    if given is None:
        return tuple(map(str, range(count)))
    if not isinstance(given, (tuple, list)) or len(given) < count or not all(isinstance(name, str) for name in given):
        raise checks.invalid("classes", given, f"a name for each of {count} classes")
    return tuple(given)


def _of_channels(name: str, given: Any, images: Tensor) -> tuple[float, ...]:
    """A mean or standard deviation as one finite number for each channel of `images` (N, C, ...), or for all."""
    expected = f"a finite number for each of {images.shape[1]} channels{', above 0' if name == 'std' else ''}"
    if not isinstance(given, (tuple, list)) or len(given) not in (1, images.shape[1]):
        raise checks.invalid(name, given, expected)
    low = torch.finfo(torch.float32).tiny if name == "std" else -np.inf
    return tuple(checks.real(name, value, expected, low) for value in given)


def normalize(images: Tensor, dataset: Dataset) -> Tensor:
    """(images - mean) / std for each channel, of bytes (B, C, ...) divided by 255 first; on the images' device."""
    mean, std = _moments(dataset.mean, dataset.std, images.dim() - 2, images.device)
    if images.dtype != torch.uint8:
        return (images - mean) / std
    return (images * (1 / (255 * std))).sub_(mean / std)  # the same, in two passes over memory instead of four


@lru_cache(16)
def _moments(mean: tuple[float, ...], std: tuple[float, ...], dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (C, 1, ...) each, on a device: kept, since a GPU waits for each upload."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(v, device=device).view(-1, *[1] * dims) for v in (mean, std))


def augment(images: Tensor, dataset: Dataset, generator: torch.Generator) -> Tensor:
    """Mirror each image (B, C, H, W) with probability 1/2 and shift it by up to `crop_padding` pixels, zeros moving in.

    What the data set does not ask for is left out. The generator is of the CPU, so that all devices see the same draws:
    B flips, then 2 x B offsets.
    """
    return _moved(images, dataset, _moves(len(images), dataset, generator).to(images.device))


def _moves(batch: int, dataset: Dataset, generator: torch.Generator) -> Tensor:
    """What is drawn to augment a batch: whether an image is mirrored, and its offsets from top and left, (3, B)."""
    moves = torch.zeros(3, batch, dtype=torch.long)
    if dataset.flip:
        moves[0] = torch.rand(batch, generator=generator) < 0.5
    if dataset.crop_padding:
        moves[1:] = torch.randint(2 * dataset.crop_padding + 1, (2, batch), generator=generator)
    return moves


def _moved(images: Tensor, dataset: Dataset, moves: Tensor) -> Tensor:
    """The images (B, C, H, W) mirrored and shifted by `moves` (3, B) on their device, see `_moves`."""
    mirrored, top, left = moves
    if dataset.flip:
        images = torch.where(mirrored.bool().view(-1, 1, 1, 1), images.flip(3), images)
    if dataset.crop_padding:
        pad, (height, width) = dataset.crop_padding, images.shape[2:]
        # a view of all (2 pad + 1)^2 crops of each image, of which one is copied
        crops = F.pad(images, [pad] * 4).unfold(2, height, 1).unfold(3, width, 1)
        images = crops[torch.arange(len(images), device=images.device), :, top, left]
    return images


def _first_of_each_class(split: Split | Streamed, count: int) -> Split | Streamed:
    """`count` samples in their order: the first of each class, then the second of each, and so on."""
    table = pd.DataFrame({"label": split.labels.cpu()})
    order = table.assign(rank=table.groupby("label").cumcount()).sort_values(["rank", "label"]).index
    return split.take(torch.tensor(order[:count].to_numpy()).sort().values)


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of (N, C, ...); bytes count as numbers in [0, 1], and exactly."""
    if images.dtype == torch.uint8:
        counts = torch.stack([channel.flatten().bincount(minlength=256).cpu() for channel in images.unbind(1)])
        share, value = counts.double() / counts[0].sum(), torch.arange(256).double() / 255
        mean = share @ value
        std = (share * (value - mean[:, None]) ** 2).sum(1).sqrt()
    else:
        moments = [torch.std_mean(channel.double(), correction=0) for channel in images.unbind(1)]
        std, mean = (torch.stack(values) for values in zip(*moments, strict=True))
    std[std <= 1e-6 * mean.abs()] = 1  # a constant channel: nothing to scale, and no division by zero
    return tuple(mean.tolist()), tuple(std.tolist())


def sha256(*splits: Split | Streamed) -> str:
    """A checksum of all inputs and labels; of a streamed split its list of files, or labels, first and last input."""
    total = hashlib.sha256()
    for split in splits:
        if isinstance(split, Streamed) and hasattr(split.items, "listing"):
            total.update(split.items.listing(split.rows))
            continue
        ends = np.arange(0, len(split), max(1, len(split) - 1))  # the first and the last
        for tensor in (split.images if isinstance(split, Split) else split[None, 0, ends][1], split.labels):
            total.update(str(tuple(tensor.shape)).encode())
            total.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # NumPy has no bfloat16
    return total.hexdigest()


Batch = tuple[Tensor, Tensor, Tensor]  # inputs (B, ...) float, labels (B,), sample indices (B,)
DAMAGED = 0.001  # the fraction of damaged files above which a data set is not worth training on


class MemoryLoader:
    """Batches of a split that lies in memory."""

    def __init__(self, data: Dataset, split: str, place: Place) -> None:
        self.data, self.split, self.place = data, getattr(data, split), place
        self.damaged: dict[int, str] = {}

    def all_damaged(self) -> None:
        """Nothing that lies in memory is damaged."""

    def epoch(self, chunks: Sequence[Tensor], generator: torch.Generator | None = None) -> Iterator[Batch]:
        """This process's part of each of `chunks` of sample indices (B,), on the data's device.

        With a generator, images are augmented. Every process augments the whole batch, so that an image looks the same
        however many processes there are.
        """
        sizes, device = [len(chunk) for chunk in chunks], self.split.labels.device
        if not sizes:
            return
        # uploaded once an epoch: a GPU waits for each upload
        parts = torch.cat(list(chunks)).to(device).split(sizes)
        if generator is not None:
            moves = torch.cat([_moves(size, self.data, generator) for size in sizes], 1).to(device).split(sizes, 1)
        for i, indices in enumerate(parts):
            images = self.split.images[indices]
            images = images if generator is None else _moved(images, self.data, moves[i])
            images, indices = self.place.part(images), self.place.part(indices)
            yield normalize(images, self.data), self.split.labels[indices], indices


class StreamLoader:
    """Batches of streamed samples, read by worker processes that live as long as this object.

    A damaged file is warned of by name, skipped and counted in `damaged`. What is random in a sample depends only on
    the generator, the number of the chunk and the sample, and not on the worker that reads it.
    """

    def __init__(self, data: Dataset, split: str, device: torch.device, place: Place, live: bool) -> None:
        self.data, self.split, self.device, self.place = data, getattr(data, split), device, place
        self.damaged: dict[int, str] = {}
        self.keys: list[Key] = []  # of the batches of an epoch
        self.batches = DataLoader(
            self.split,
            batch_size=None,  # an item is a batch already
            sampler=self.keys,
            num_workers=self.split.workers,
            persistent_workers=live and self.split.workers > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # of the workers' seeds, which nothing uses: leaves the global one alone
        )

    def epoch(self, chunks: Sequence[Tensor], generator: torch.Generator | None = None) -> Iterator[Batch]:
        """This process's part of each of `chunks` of sample indices (B,), without samples whose files are damaged.

        What the dataset does at random is drawn by the generator's seed; without one, the same way each time.
        ValueError: too many damaged files, a chunk of nothing else, an item of another kind, unequal shapes.
        """
        seed = None if generator is None else generator.initial_seed()
        self.keys[:] = [(seed, n, self.place.part(chunk).cpu().numpy()) for n, chunk in enumerate(chunks)]
        for indices, images, damaged in self.batches:
            for index, message in damaged:
                if index not in self.damaged:
                    self.damaged[index] = message
                    warnings.warn(f"{message}; skipped, {len(self.damaged)} so far", stacklevel=2)
            self._check()
            if len(indices) == 0:
                raise ValueError(f"{damaged[0][1]}, and so is every image of its batch")
            found = (images, self.split.labels[indices], indices)
            images, labels, indices = (x.to(self.device, non_blocking=True) for x in found)
            yield normalize(images, self.data), labels, indices

    def all_damaged(self) -> int:
        """How many files any process has found damaged so far; all processes ask together. ValueError: too many."""
        for theirs in self.place.collect(self.damaged):
            self.damaged = self.damaged | theirs
        self._check()
        return len(self.damaged)

    def _check(self) -> None:
        if len(self.damaged) > DAMAGED * len(self.split):
            some = "\n".join(list(self.damaged.values())[:5])
            expected = f"at most {DAMAGED:.1%} of the {len(self.split)} files damaged"
            raise checks.invalid("data", f"{len(self.damaged)} damaged files", f"{expected}; the first are\n{some}")


def loader(
    data: Dataset, split: str, device: torch.device, place: Place | None = None, live: bool = True
) -> MemoryLoader | StreamLoader:
    """The loader of "train" or "test"; this process gets its part of each batch, by its place, if there are several.

    live: whether worker processes are kept between epochs.
    """
    if isinstance(getattr(data, split), Streamed):
        return StreamLoader(data, split, device, place or Place(), live)
    return MemoryLoader(data, split, place or Place())
