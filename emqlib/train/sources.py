"""Where data sets are found and how their files are read: `load_dataset`."""

import contextlib
import copy
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from tqdm import tqdm  # not tqdm.contrib, which warns in a notebook without ipywidgets

from .. import checks, files
from .data import CROP, Damaged, Dataset, Split, Streamed, sha256, statistics

Labelled = list[tuple[Path, str]]  # an image file and its class
Triple = tuple[float, float, float]
Transform = Callable[[Tensor], Tensor]
VERSION = 1  # of the cache
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # of pixels alone: Pillow would run PostScript
MAX_PIXELS = 1024**3 // 12  # of an image: Pillow's own limit, where a program has turned that off


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
    if path:
        with checks.expecting("name", name, "imagefolder:PATH with the path of a folder"):
            place = checks.path("PATH", path)
    else:
        place = checks.path("root", os.environ.get("EMQ_DATA") or files.home() / "data" if root is None else root)
    top = Path(os.path.expanduser(place)).absolute()
    folder, found = _find(name, source, top, image_size)
    if isinstance(found[0], list):
        train, test, classes = _of_files(folder, *found, source, image_size, workers if streamed else None)
    elif streamed:
        raise checks.invalid("stream", True, f"False for {name!r}, which was found as whole files")
    else:
        train, test, classes = found
    mean, std = source.statistics or (IMAGENET if streamed else statistics(train.images))
    return Dataset(name, train, test, classes, mean, std, source.flip, source.crop_padding, sha256(train, test))


def check_name(parameter: str, name: Any) -> str:
    """The key of `SOURCES` that `name` means; ValueError, which names the parameter, where there is none."""
    kind, _, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    return checks.choice(parameter, f"{kind}:PATH" if path and f"{kind}:PATH" in SOURCES else name, SOURCES)


def _workers() -> int:
    """The CPUs of this process, shared with other processes of a launcher on this machine."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # Linux, others
    return max(1, min(16, own // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def list_classes(folder: Path) -> Labelled:
    """All image files below <folder>/<class>/, sorted; hidden ones and those of other types are left out.

    FileNotFoundError: no such folder. ValueError: no class in it, or a class without images.
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
    """The image files in `folder` and their classes, of which `table` has a line each: name, separator, class.

    `skip` lines are a header; names come without the files' `suffix`. FileNotFoundError: no such table, or no such
    folder. ValueError: the lines are not one for each image of the folder.
    """
    lines = table.read_text("utf-8", errors="replace").splitlines()[skip:]
    rows = [line.partition(separator)[::2] for line in lines if line.strip()]
    told = {f"{name}{suffix}": classes.split()[0] for name, classes in rows if classes.strip()}
    odd = told.keys() ^ {name for name in os.listdir(folder) if _is_image(name)}
    if odd or len(told) < len(rows):
        found = f"{min(odd)!r} on one side alone" if odd else "an image twice, or a line without a class"
        raise ValueError(f"{table}: expected one line, with a class, for each image of {folder}, found {found}")
    return [(folder / name, label) for name, label in told.items()]


class ImageFiles(torch.utils.data.Dataset):
    """A map-style dataset of image files and their labels (N,), decoded and transformed when they are asked for."""

    def __init__(self, folder: Path, paths: Sequence[Path], labels: Tensor, transform: Transform) -> None:
        start = len(str(folder).rstrip("/")) + 1
        # bytes, below the folder: a million texts would be copied into each worker process
        self.names = np.array([os.fsencode(str(path)[start:]) for path in paths])
        self.folder, self.targets, self.transform = folder, labels, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(decode(self.path(index), None)).permute(2, 0, 1)  # resized faster without a copy
        return self.transform(image), int(self.targets[index])

    def path(self, index: int) -> Path:
        """The file of an item."""
        return self.folder / os.fsdecode(self.names[index])

    def seen_as(self, other: "ImageFiles") -> "ImageFiles":
        """The same files with the transform of `other`."""
        same = copy.copy(self)
        same.transform = other.transform
        return same

    def listing(self, rows: Tensor) -> bytes:
        """Names, sizes and labels of the files at `rows` (K,). Contents are not read: ImageNet has 150 GB of them."""
        names, folder = self.names[rows.numpy()], os.fsencode(self.folder)
        sizes = np.array([os.stat(os.path.join(folder, name)).st_size for name in names])
        return b"".join([b"\0".join(names.tolist()), sizes.tobytes(), self.targets[rows].numpy().tobytes()])


def transforms(size: int, flip: bool) -> tuple[Transform, Transform]:
    """What makes images (3, H, W) into (3, S, S), as usual for ImageNet: at random for training, and for testing."""
    from torchvision.transforms import v2

    mirrored = [v2.RandomHorizontalFlip()] if flip else []
    train = v2.Compose([v2.RandomResizedCrop(size, antialias=True), *mirrored])
    return train, v2.Compose([v2.Resize(round(size / CROP), antialias=True), v2.CenterCrop(size)])


def load_images(folder: Path, paths: Sequence[Path], image_size: int | None) -> Tensor:
    """The images at `paths`, (N, 3, H, W) uint8; a cache keeps what tens of thousands of files take long to decode to.

    The cache lies beside the data, or else below the user's cache folder, with a checksum of its pixels. It is made
    anew if a file has another size, time or inode than when the cache was made, as in a copy. A file that rots on its
    disk is not seen, nor is one that is written twice within a tick of the clock, nor, on Windows, one that is
    rewritten in place with its time put back. image_size: see `pixels`. ValueError: a file that is no readable image,
    images of unequal size.
    """
    start, stats = len(str(folder)), [path.stat() for path in paths]  # before decoding: a later change is seen
    names = [(str(path)[start:], stat.st_size) for path, stat in zip(paths, stats, strict=True)]
    name = files.digest(files.canonical_json([image_size, names]))
    times = [(stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for stat in stats]  # each write changes one of these
    about = {"version": VERSION, "states": files.digest(files.canonical_json(times))}
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    own = Path(home, "emqlib", files.digest(str(folder.resolve()))[:16])
    caches = [place / f"{name}.safetensors" for place in (folder / ".emqlib", own)]
    for cache in caches:
        with contextlib.suppress(OSError, ValueError):  # no cache, or a damaged one: make it anew
            return _read_cache(cache, len(paths), about["states"])
    images = _decode_all(paths, image_size)
    for cache in caches:
        with contextlib.suppress(OSError):  # a folder that cannot be written to: try the next, or do without
            files.write(cache, about, {"images": images})
            break
    return images


def _read_cache(cache: Path, count: int, states: str) -> Tensor:
    """The images (N, 3, H, W) in a cache; OSError or ValueError: it is not whole, or of files in another state."""
    about, tensors = files.read(cache, VERSION, "a whole cache of these files", "cache")
    images = tensors.get("images", torch.empty(0))
    if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != count or about.get("states") != states:
        raise checks.invalid("cache", str(cache), "a cache of these files")
    return images.clone()  # the file is mapped: what is written to it later must not be seen


def _decode_all(paths: Sequence[Path], image_size: int | None) -> Tensor:
    """The images, decoded in threads, with a progress bar."""
    first = decode(paths[0], image_size)
    images = np.empty((len(paths), 3, *first.shape[:2]), np.uint8)

    def decode_one(i: int) -> None:
        image = decode(paths[i], image_size)
        if image.shape != first.shape:
            sizes = f"{first.shape[:2]} in {paths[0]}, {image.shape[:2]} in {paths[i]}"
            raise ValueError(f"images differ in (height, width): {sizes}; image_size= makes them equal")
        images[i] = image.transpose(2, 0, 1)

    with ThreadPoolExecutor(8) as pool:
        for _ in tqdm(pool.map(decode_one, range(len(paths))), total=len(paths), disable=None, unit=" files"):
            pass
    return torch.from_numpy(images)


def decode(path: Path, image_size: int | None) -> np.ndarray:
    """The image at `path`, see `pixels`.

    Damaged: it is no readable image, is of a format that is not in `FORMATS`, whatever its name says, or has more
    pixels than `PIL.Image.MAX_IMAGE_PIXELS`, or, where that is None, than 89 million.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:  # has read no more than the file's header
            limit = Image.MAX_IMAGE_PIXELS or MAX_PIXELS
            if image.width * image.height > limit:
                raise ValueError(f"{image.size} pixels, more than {limit}, see PIL.Image.MAX_IMAGE_PIXELS")
            return pixels(image, image_size)
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... for damaged files
        raise Damaged(f"{path}: not a readable image ({error})") from error


def pixels(image: Image.Image, image_size: int | None) -> np.ndarray:
    """(H, W, 3) uint8 of an image in any mode; transparency is dropped.

    image_size: resize the shorter side to so many pixels and cut out the centre; None: leave it as it is.
    """
    if image.mode == "F" or (image.mode, image.format) == ("I", "TIFF"):  # whose range is not known
        raise ValueError("32 bits a pixel; save it with 8 or 16")
    if image.mode.startswith("I"):  # 16 bits: convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P":  # on the way to RGB a transparent colour would make it warn
        image = image.convert("RGBA")
    if image.mode != "RGB":  # of RGB it would make a copy, which takes long
        image = image.convert("RGB")
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.array(image)


# Finding and reading. A reader is given a place and an image size, and returns both splits and the class names, or the
# labelled image files of both. Where it finds nothing it raises FileNotFoundError, and the next place is tried.

Whole = tuple[Split, Split, tuple[str, ...]]
Reader = Callable[[Path, int | None], Whole | tuple[Labelled, Labelled]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is known of a data set before its files are read."""

    places: tuple[tuple[str, Reader], ...]  # under root, each with what reads it; the first that has the data wins
    how_to_get: str  # the end of the message where there is no data
    num_classes: int | None = None  # that class folders must have; None: any
    statistics: tuple[Triple, Triple] | None = None  # mean and std; None: of the training images
    flip: bool = True
    crop_padding: int = 4
    stream: bool = False


def _find(name: str, source: Source, root: Path, image_size: int | None) -> tuple[Path, Any]:
    """The first place that has the data, and what its reader returns; FileNotFoundError that names all places."""
    looked = []
    for place, read in source.places:
        try:
            return root / place, read(root / place, image_size)
        except FileNotFoundError as error:
            looked.append(f"  {error}")
    raise FileNotFoundError("\n".join([f"no data for {name!r}. Looked in:", *looked, source.how_to_get]))


def _digits(_: Path, image_size: int | None) -> Whole:
    """scikit-learn's handwritten digits, (1797, 8, 8) of 0 to 16; every fifth of a class is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits are part of scikit-learn: pip install "emqlib[notebook]"') from error
    digits = load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(small, size=image_size or 32, mode="bilinear").round().byte().repeat(1, 3, 1, 1)
    labels = torch.from_numpy(digits.target).long()
    is_test = torch.tensor(pd.Series(digits.target).groupby(digits.target).cumcount().to_numpy() % 5 == 4)
    train, test = (Split(images[rows], labels[rows]) for rows in (~is_test, is_test))
    return train, test, tuple(str(digit) for digit in digits.target_names)


def _official_cifar(official: Any, folder: Path, image_size: int | None, download: bool = False) -> Whole:
    """Files of torchvision's class `official`, checksums verified."""
    if not download and not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    try:
        parts = [official(folder.parent, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(f"{folder}: incomplete or damaged (checksums differ)") from error
    if image_size is not None:
        for part in parts:
            part.data = np.stack([pixels(Image.fromarray(image), image_size) for image in part.data])
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    train, test = (Split(images[i], torch.tensor(part.targets)) for i, part in enumerate(parts))
    return train, test, tuple(parts[0].classes)


def _download_cifar(official: Any, root: Path, image_size: int | None) -> Whole:
    """Let torchvision download into `root`, and read that. What it left half done fails its checksums next time."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # seconds without an answer: a machine without a network must hear so at once
    try:
        return _official_cifar(official, root / official.base_folder, image_size, download=True)
    except (OSError, HTTPException) as error:
        raise FileNotFoundError(f"{official.url}: download failed ({error})") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _class_folders(folder: Path, _: int | None) -> tuple[Labelled, Labelled]:
    """train/<class>/* and test/<class>/* or val/<class>/*; labels follow the sorted names, as CIFAR's own do."""
    held_out = folder / "test"
    labelled = held_out.is_dir() and any(entry.is_dir() for entry in held_out.iterdir())  # ImageNet's is not
    if not labelled and (folder / "val").is_dir():
        held_out = folder / "val"
    return list_classes(folder / "train"), list_classes(held_out)


def _tiny_imagenet(folder: Path, _: int | None) -> tuple[Labelled, Labelled]:
    """train/<wnid>/images/* and val/images/* with val/val_annotations.txt; the test split has no labels."""
    val = folder / "val"
    return list_classes(folder / "train"), list_annotated(val / "val_annotations.txt", val / "images", "\t")


def _kaggle(folder: Path, _: int | None) -> tuple[Labelled, Labelled]:
    """ILSVRC as Kaggle packs it: train/<wnid>/*, val/* in one folder, and LOC_val_solution.csv beside ILSVRC/."""
    train, answers = list_classes(folder / "train"), folder.parents[2] / "LOC_val_solution.csv"
    return train, sorted(list_annotated(answers, folder / "val", ",", suffix=".JPEG", skip=1))


def _of_files(
    folder: Path, train: Labelled, test: Labelled, source: Source, image_size: int | None, workers: int | None
) -> Whole | tuple[Streamed, Streamed, tuple[str, ...]]:
    """The splits of image files below `folder`, decoded now, or streamed by `workers`; and their classes."""
    classes = tuple(sorted({name for _, name in train}))
    if source.num_classes not in (None, len(classes)):
        raise ValueError(f"{folder / 'train'}: expected {source.num_classes} classes, found {len(classes)}")
    index = {name: i for i, name in enumerate(classes)}
    for path, name in test:
        if name not in index:
            raise ValueError(f"{path}: its class {name!r} has no images for training in {folder / 'train'}")
    paths, labels = [path for path, _ in train + test], torch.tensor([index[name] for _, name in train + test])
    n = len(train)
    if workers is None:
        images = load_images(folder, paths, image_size)
        return Split(images[:n], labels[:n]), Split(images[n:], labels[n:]), classes
    at_random, plain = transforms(image_size or 224, source.flip)
    first = Streamed.of(ImageFiles(folder, paths[:n], labels[:n], at_random), workers)
    second = Streamed.of(ImageFiles(folder, paths[n:], labels[n:], plain), workers)
    return first, second, classes


_ELSEWHERE = "or point root= or the environment variable EMQ_DATA at the folder that holds it."


def _cifar(name: str, official: Any, num_classes: int, mean: Triple, std: Triple) -> Source:
    return Source(
        places=(
            (official.base_folder, partial(_official_cifar, official)),
            (name, _class_folders),
            ("", partial(_download_cifar, official)),
        ),
        how_to_get=f"Unpack {official.url} there, {_ELSEWHERE}",
        num_classes=num_classes,
        statistics=(mean, std),
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
