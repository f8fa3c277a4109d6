"""Data sets: where they are found, how they are read, normalised, augmented and batched."""

import contextlib
import hashlib
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from tqdm import tqdm

from .. import checks, files
from .distributed import Place

Labelled = list[tuple[Path, str]]  # an image file and its class
VERSION = 1  # of the cache
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # of pixels alone: Pillow would run PostScript
MAX_PIXELS = 1024**3 // 12  # of an image: Pillow's own limit, where a program has turned that off


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """A split of N files whose images are decoded when they are needed."""

    folder: Path
    names: np.ndarray  # (N,) of bytes, paths below `folder`; a million texts would be copied into each worker process
    labels: Tensor  # (N,) int64
    image_size: int  # pixels of a side, S
    workers: int  # how many processes decode

    @classmethod
    def of(
        cls, folder: Path, paths: Sequence[Path], labels: Tensor, image_size: int | None, workers: int
    ) -> "ImageFiles":
        """The files at `paths`, all below `folder`, with labels (N,); image_size: None for 224."""
        start = len(str(folder).rstrip("/")) + 1
        names = np.array([os.fsencode(str(path)[start:]) for path in paths])
        return cls(folder, names, labels, image_size or 224, workers)

    def __len__(self) -> int:
        """Number of images, N."""
        return len(self.labels)

    def to(self, device: torch.device | str) -> "ImageFiles":
        """Itself: what is decoded goes to a device, the list of files stays."""
        return self

    def take(self, indices: Tensor) -> "ImageFiles":
        """The samples at `indices` (K,) alone."""
        return replace(self, names=self.names[indices.numpy()], labels=self.labels[indices])

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return self.folder / os.fsdecode(self.names[index])

    def listing(self) -> bytes:
        """Names, sizes and labels of all files as bytes. Contents are not read: ImageNet has 150 GB of them."""
        sizes = np.array([os.stat(os.path.join(os.fsencode(self.folder), name)).st_size for name in self.names])
        return b"".join([b"\0".join(self.names.tolist()), sizes.tobytes(), self.labels.numpy().tobytes()])


def list_classes(folder: Path) -> Labelled:
    """All image files below <folder>/<class>/, sorted; hidden ones and those of other types are left out.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no class in it, or a class without images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    start = len(str(folder))
    try:
        names = [name for name in find_classes(folder)[0] if not name.startswith(".")]
        index = {name: i for i, name in enumerate(names)}
        found = make_dataset(folder, index, is_valid_file=lambda path: _is_image(path[start:]))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{folder}: expected one folder with images for each class ({error})") from error
    return [(Path(path), names[i]) for path, i in found]


def _is_image(path: str) -> bool:
    return path.lower().endswith(IMG_EXTENSIONS) and f"{os.sep}." not in f"{os.sep}{path}"


def list_annotated(table: Path, folder: Path, separator: str, suffix: str = "", skip: int = 0) -> Labelled:
    """The image files in `folder` that the lines of `table` name, each before a separator, and their classes after it.

    Args:
        suffix: of the files, not in the names.
        skip: lines of a header.

    Raises:
        ValueError: a line without a name or a class; a name that leads out of the folder, is there twice or has no
            file; an image in the folder that no line names, as in a table that was cut short.
    """
    found: dict[Path, str] = {}
    for n, line in enumerate(table.read_text("utf-8", errors="replace").splitlines()):
        if n < skip or not line.strip():
            continue
        name, _, told = line.partition(separator)
        path = folder / f"{name}{suffix}"
        inside = name and "\0" not in name and Path(name).name == name and name != ".."
        if not inside or not told.strip() or path in found or not path.is_file():
            expected = f"an image that lies in {folder}, once, then {separator!r} and its class"
            raise ValueError(f"{table}, line {n + 1}: {line[:80]!r}: expected {expected}")
        found[path] = told.split()[0]
    there = (folder / name for name in sorted(os.listdir(folder)) if _is_image(name))
    unnamed = next((path for path in there if path not in found), None)
    if unnamed is not None:
        raise ValueError(f"{table}: expected a line for each image of {folder}, found none for {unnamed.name}")
    return list(found.items())


def load_images(folder: Path, paths: Sequence[Path], image_size: int | None) -> Tensor:
    """The images at `paths`, (N, 3, H, W) uint8; a cache keeps what tens of thousands of files take long to decode to.

    The cache lies beside the data, or else below the user's cache folder, with checksums of its pixels and of the
    files. It is made anew if its pixels are not those that were written, or if the files have other contents. Files
    are read for that only if their times or inodes differ from those of when the cache was made, as in a copy. So a
    file that rots on its disk is not seen, nor is one that is written twice within a tick of the file system's clock,
    nor, on Windows, one that is rewritten in place with its time put back.

    Args:
        image_size: see `pixels`.

    Raises:
        ValueError: a file that is no readable image, images of unequal size.
    """
    name, states = _listing(folder, paths, image_size)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = Path(home, "emqlib", files.digest(str(folder.resolve()))[:16])
    caches = [place / f"{name}.safetensors" for place in (folder / ".emqlib", own)]
    for cache in caches:
        with contextlib.suppress(OSError, ValueError):  # no cache, or a damaged one: make it anew
            return _read_cache(cache, paths, states)
    images, contents = _decode_all(paths, image_size)
    for cache in caches:
        with contextlib.suppress(OSError):  # a folder that cannot be written to: try the next, or do without
            _write_cache(cache, images, states, contents)
            break
    return images


def _listing(folder: Path, paths: Sequence[Path], image_size: int | None) -> tuple[str, str]:
    """Digests of names and sizes, which copies share, and of times and inodes, of which each write changes one."""
    start, stats = len(str(folder)), [path.stat() for path in paths]
    names = [(str(path)[start:], stat.st_size) for path, stat in zip(paths, stats, strict=True)]
    states = [(stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for stat in stats]
    return files.digest(files.canonical_json([image_size, names])), files.digest(files.canonical_json(states))


def _read_cache(cache: Path, paths: Sequence[Path], states: str) -> Tensor:
    """What `_write_cache` wrote; OSError or ValueError: it is not whole, or the files have other contents."""
    expected = "a whole cache of these files"
    about, tensors = files.read(cache, VERSION, expected, "cache")
    images, same = tensors.get("images", torch.empty(0)), about.get("states") == states
    contents = about.get("contents") if same else _contents(paths)
    whole = images.dtype == torch.uint8 and images.dim() == 4 and len(images) == len(paths)
    if not whole or contents != about.get("contents"):
        raise checks.invalid("cache", str(cache), expected)
    images = images.clone()  # the file is mapped: what is written to it later must not be seen
    if not same:
        with contextlib.suppress(OSError):  # where it cannot be written, the files are read each time
            _write_cache(cache, images, states, contents)
    return images


def _write_cache(cache: Path, images: Tensor, states: str, contents: str) -> None:
    files.write(cache, {"version": VERSION, "states": states, "contents": contents}, {"images": images})


def _contents(paths: Sequence[Path]) -> str:
    """A digest of the bytes of all files."""
    return files.digest("".join(_of_each(lambda i: _digest(paths[i]), len(paths))))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decode_all(paths: Sequence[Path], image_size: int | None) -> tuple[Tensor, str]:
    """The images, and the `_contents` of their files."""
    first = decode(paths[0], image_size)
    images = np.empty((len(paths), 3, *first.shape[:2]), np.uint8)

    def decode_one(i: int) -> str:
        digest = _digest(paths[i])  # before: of a file that is replaced meanwhile, it must not name the new contents
        image = decode(paths[i], image_size)
        if image.shape != first.shape:
            sizes = f"{first.shape[:2]} in {paths[0]}, {image.shape[:2]} in {paths[i]}"
            raise ValueError(f"images differ in (height, width): {sizes}; image_size= makes them equal")
        images[i] = image.transpose(2, 0, 1)
        return digest

    return torch.from_numpy(images), files.digest("".join(_of_each(decode_one, len(paths))))


def _of_each(work: Callable[[int], str], count: int) -> list[str]:
    """What `work` returns of each number below `count`, in threads, with a progress bar."""
    some = 64  # numbers in a task: with fewer, threads wait for each other

    def of_some(start: int) -> list[str]:
        return [work(i) for i in range(start, min(start + some, count))]

    starts = range(0, count, some)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = tqdm(pool.map(of_some, starts), total=len(starts), disable=None, unit=f" x {some} files")
        return [digest for part in parts for digest in part]


def decode(path: Path, image_size: int | None) -> np.ndarray:
    """The image at `path`, see `pixels`.

    Raises:
        ValueError: the file is no readable image, is of a format that is not in `FORMATS`, whatever its name says, or
            has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or, where that is None, than 89 million.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:  # has read no more than the file's header
            limit = Image.MAX_IMAGE_PIXELS or MAX_PIXELS
            if image.width * image.height > limit:
                raise ValueError(f"{image.size} pixels, more than {limit}, see PIL.Image.MAX_IMAGE_PIXELS")
            return pixels(image, image_size)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... for damaged files
        raise ValueError(f"{path}: not a readable image ({error})") from error


def pixels(image: Image.Image, image_size: int | None) -> np.ndarray:
    """(H, W, 3) uint8 of an image in any mode; transparency is dropped.

    Args:
        image_size: resize the shorter side to so many pixels and cut out the centre; None: leave it as it is.
    """
    if image.mode.startswith("I"):  # 16 bits: convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P":  # on the way to RGB a transparent colour would make it warn
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)


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

        The original order stays. A class with too few images leaves its places to the others.

        Raises:
            ValueError: `train` or `test` is not between 1 and the number of images there are.
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
    """Read a data set into memory, on the CPU, or list the files of one that is streamed.

    Args:
        name: "digits", "cifar10", "cifar100", "tinyimagenet", "imagenet", or "imagefolder:PATH" for any folder that
            holds train/<class>/* and test/<class>/* (or val/<class>/*).
        root: where the files are; None: the environment variable EMQ_DATA, else data/ in `files.home()`. There the
            official files are looked for, then <name>/{train,test}/<class>/*; at last, CIFAR is downloaded.
        image_size: resize the shorter side to this many pixels and cut out the centre; None: images as they are.
            Streamed images (None: 224) are cropped and resized at random for training, as usual for ImageNet.
        stream: decode the files of class folders in each epoch instead of once; None: only ImageNet, which fits no
            memory.
        workers: processes that decode; None for the CPUs of this process, at most 16; 0 for none.

    Raises:
        ValueError: unknown name, images of unequal size, a damaged image, missing or unexpected classes, stream=True
            for a data set that is no files of single images.
        FileNotFoundError: no data; says where it was looked for and how to get it.
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
    return checks.choice(parameter, f"{kind}:PATH" if path and f"{kind}:PATH" in SOURCES else name, SOURCES)


def _workers() -> int:
    """The CPUs of this process, shared with other processes of a launcher on this machine."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # Linux, others
    return max(1, min(16, own // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def normalize(images: Tensor, dataset: Dataset) -> Tensor:
    """(images / 255 - mean) / std for each channel: (B, 3, H, W) uint8 to float32, on the images' device."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (dataset.mean, dataset.std))
    return (images * (1 / (255 * std))).sub_(mean / std)  # the same, in two passes over memory instead of four


def augment(images: Tensor, dataset: Dataset, generator: torch.Generator) -> Tensor:
    """Mirror each image with probability 1/2 and shift it by up to `crop_padding` pixels, zeros moving in.

    Args:
        images: (B, 3, H, W) uint8, on any device.
        dataset: what it does not ask for is left out.
        generator: of the CPU, so that every device sees the same draws: B flips, then 2 x B offsets.
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
    train, annotations = list_classes(folder / "train"), folder / "val" / "val_annotations.txt"
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

Batch = tuple[Tensor, Tensor, Tensor]  # images (B, 3, H, W) float, labels (B,), sample indices (B,)
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
        for chunk in chunks:
            indices = chunk.to(self.split.labels.device)
            images = self.split.images[indices]
            images = images if generator is None else augment(images, self.data, generator)
            images, indices = self.place.part(images), self.place.part(indices)
            yield normalize(images, self.data), self.split.labels[indices], indices


class FileLoader:
    """Batches of streamed files, decoded by worker processes that live as long as this object.

    A damaged file is warned of by name, skipped and counted in `damaged`. What an image becomes depends only on the
    generator, the number of the chunk and the sample, and not on the worker that decodes it.
    """

    def __init__(self, data: Dataset, split: str, device: torch.device, place: Place, live: bool) -> None:
        self.data, self.split, self.device, self.place = data, getattr(data, split), device, place
        self.damaged: dict[int, str] = {}
        self.keys = _Keys(place)
        workers = self.split.workers
        self.batches = DataLoader(
            _Files(self.split, data.flip),
            batch_sampler=self.keys,
            num_workers=workers,
            persistent_workers=live and workers > 0,
            pin_memory=device.type == "cuda",
            collate_fn=_collate,
            generator=torch.Generator(),  # of the workers' seeds, which nothing uses: leaves the global one alone
        )

    def epoch(self, chunks: Sequence[Tensor], generator: torch.Generator | None = None) -> Iterator[Batch]:
        """This process's part of each of `chunks` of sample indices (B,), without samples whose files are damaged.

        With a generator images are cropped, resized and mirrored at random, else resized and cut out of the centre.

        Raises:
            ValueError: too many damaged files, or a chunk of nothing else.
        """
        self.keys.seed, self.keys.chunks = None if generator is None else generator.initial_seed(), chunks
        for indices, images, damaged in self.batches:
            self._count(damaged)
            if len(indices) == 0:
                raise ValueError(f"{self.split.path(damaged[0][0])}: damaged, and so is every image of its batch")
            moved = (x.to(self.device, non_blocking=True) for x in (images, self.split.labels[indices], indices))
            images, labels, indices = moved
            yield normalize(images, self.data), labels, indices

    def _count(self, damaged: list[tuple[int, str]]) -> None:
        for index, message in damaged:
            if index not in self.damaged:
                self.damaged[index] = message
                warnings.warn(f"{message}; skipped, {len(self.damaged)} so far", stacklevel=2)
        self._check()

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
) -> MemoryLoader | FileLoader:
    """The loader of "train" or "test".

    Args:
        place: of this process, which gets its part of each batch; None: alone.
        live: whether worker processes are kept between epochs.
    """
    if isinstance(getattr(data, split), ImageFiles):
        return FileLoader(data, split, device, place or Place(), live)
    return MemoryLoader(data, split, place or Place())


_Key = tuple[int | None, int, int]  # seed of the epoch, None for no augmentation; number of the chunk; sample


class _Keys:
    """What a DataLoader asks for the batches of an epoch: this process's part of the chunks that it finds here."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.seed: int | None = None
        self.chunks: Sequence[Tensor] = ()

    def __iter__(self) -> Iterator[list[_Key]]:
        for n, chunk in enumerate(self.chunks):
            yield [(self.seed, n, i) for i in self.place.part(chunk).tolist()]

    def __len__(self) -> int:
        return len(self.chunks)


class _Files(torch.utils.data.Dataset):
    """By key: the sample, and its image (3, S, S) uint8, or what is wrong with its file."""

    def __init__(self, split: ImageFiles, flip: bool) -> None:
        from torchvision.transforms import v2

        self.split, size = split, split.image_size
        mirrored = [v2.RandomHorizontalFlip()] if flip else []
        self.augmented = v2.Compose([v2.RandomResizedCrop(size, antialias=True), *mirrored])
        self.plain = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)])

    def __getitem__(self, key: _Key) -> tuple[int, Tensor | str]:
        seed, chunk, index = key
        try:
            image = torch.from_numpy(decode(self.split.path(index), None).transpose(2, 0, 1).copy())
        except ValueError as error:
            return index, str(error)
        if seed is None:
            return index, self.plain(image)
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            torch.default_generator.manual_seed(int(files.digest(f"{seed},{chunk},{index}")[:15], 16))
            return index, self.augmented(image)

    def __len__(self) -> int:
        return len(self.split)


def _collate(items: list[tuple[int, Tensor | str]]) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
    good = [(i, image) for i, image in items if isinstance(image, Tensor)]
    images = torch.stack([image for _, image in good]) if good else torch.empty(0, 3, 1, 1, dtype=torch.uint8)
    return torch.tensor([i for i, _ in good], dtype=torch.long), images, [x for x in items if isinstance(x[1], str)]
