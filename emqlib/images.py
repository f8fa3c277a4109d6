"""Image files: listed by class, decoded to uint8 at once and kept so, or listed only, to be decoded when needed."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from . import checks, container, files

Labelled = list[tuple[Path, str]]  # an image file and its class
VERSION = 1  # of the cache
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # of pixels alone: Pillow would run PostScript
MAX_PIXELS = 1024**3 // 12  # of an image: Pillow's own limit, where a program has turned that off


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """A split whose images are decoded when they are needed: N files below `folder` and their labels (N,) int64.

    names: (N,) of bytes, the paths below `folder`; as an array, because each of a million Python strings would be
    copied into each worker process. image_size: pixels of a side, S. workers: how many processes decode.
    """

    folder: Path
    names: np.ndarray
    labels: Tensor
    image_size: int
    workers: int

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
        """Names, sizes and labels of all files as bytes; other contents of the same size, 150 GB to read, go unseen."""
        sizes = np.array([os.stat(os.path.join(os.fsencode(self.folder), name)).st_size for name in self.names])
        return b"".join([b"\0".join(self.names.tolist()), sizes.tobytes(), self.labels.numpy().tobytes()])


def list_classes(folder: Path, inner: str = "") -> Labelled:
    """All image files of <folder>/<class>/<inner>/, sorted; hidden files and those of other types are left out.

    FileNotFoundError: no such folder. ValueError: no class in it, or a class without images.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise ValueError(f"{folder}: expected one folder for each class, found none")
    found: Labelled = []
    for entry in classes:
        names = sorted(os.listdir(entry / inner)) if (entry / inner).is_dir() else []
        images = [name for name in names if _is_image(name)]
        if not images:
            raise ValueError(f"{entry / inner}: expected images of this class, found none")
        found += [(entry / inner / name, entry.name) for name in images]
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def list_annotated(table: Path, folder: Path, separator: str, suffix: str = "", skip: int = 0) -> Labelled:
    """The image files in `folder` that the lines of `table` name, each before a separator, and their classes after it.

    suffix: of files, not in the names; skip: lines of a header. ValueError: a line without both, a name that leads out
    of the folder, is there twice or has no file; an image in the folder that no line names, as of a table cut short.
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
    """The images at `paths`, (N, 3, H, W) uint8, decoded once: tens of thousands of files take tens of seconds.

    The cache beside the data, or else below the user's cache folder, holds checksums of its pixels and of the files. It
    is made anew where its pixels are not those that were written, or the files have other contents. For that, files are
    read only if their times (that of the last change too, which no program can set) or inodes are others than when the
    cache was made, as in a copy. Not seen are a file that rots on its disk, one written twice within a tick of the file
    system's clock, and on Windows, which has no time of the last change, one rewritten in place with its time put back.
    image_size: see `pixels`. ValueError: a file that is no readable image, images of unequal size.
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
    about, tensors = container.read(cache, VERSION, expected, "cache")
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
    container.write(cache, {"version": VERSION, "states": states, "contents": contents}, {"images": images})


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
    some, found = 64, []  # numbers a task: fewer, and threads wait for each other

    def of_some(start: int) -> list[str]:
        return [work(i) for i in range(start, min(start + some, count))]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, tqdm(total=count, disable=None) as progress:
        for part in pool.map(of_some, range(0, count, some)):
            found += part
            progress.update(len(part))
    return found


def decode(path: Path, image_size: int | None) -> np.ndarray:
    """The image at `path`, see `pixels`; ValueError, which names it, for a file that is no readable image.

    A file of a format that is not in `FORMATS` is refused too, whatever its name says, and so is an image of more
    pixels than Pillow's limit, `PIL.Image.MAX_IMAGE_PIXELS`, or, where that is None, than 89 million.
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

    image_size: the shorter side becomes so many pixels and the centre is cut out, a square; None: as it is.
    """
    if image.mode.startswith("I"):  # 16 bits: convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P":  # on the way to RGB a transparent colour would make it warn
        image = image.convert("RGBA")
    image = image.convert("RGB")
    if image_size is not None:
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image)
